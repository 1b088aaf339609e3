"""A small cluster for tests of the policy engine, and short words for it."""

import yaml

from tests.naive import policy as naive
from tests.policy_world import PolicyWorld, addresses, namespace, node, pod, policy

HTTP = (("http", 80, "TCP"),)
CNP, CCNP = "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy"


def begin(shared: PolicyWorld) -> PolicyWorld:
    """Two nodes, namespaces x and y, pods x/a (port 2), x/b (3) here and y/c there; no policy."""
    shared.manifests.clear()
    shared.endpoints.clear()
    shared.put(node(1), node(2), namespace("x"), namespace("y", team="red"))
    for number, (space, name, host) in enumerate((("x", "a", 1), ("x", "b", 1), ("y", "c", 2))):
        one = pod(space, name, 10 + number, host, HTTP, app=name)
        shared.put(one)
        if host == 1:
            shared.attach(2 + number, one)
    shared.start()
    assert shared.update() == []
    return shared


A4, B4, C4 = addresses(1, 10)[0], addresses(1, 11)[0], addresses(2, 12)[0]


def write(world, name: str, text: str, kind="NetworkPolicy", space="x", **notes) -> dict:
    made = policy(space, name, yaml.safe_load(text), kind, **notes)
    world.put(made)
    return made


def row_of(world, port: int) -> int:
    return int(world.shm.subjects[port]["policy"])


ALLOW_C = (
    "{podSelector: {}, ingress: [{from: [{namespaceSelector: {}, "
    "podSelector: {matchLabels: {app: c}}}]}]}"
)


def peer(world, address: str) -> tuple[int, int]:
    """Identity and flags of an address."""
    row = world.shm.peers[naive.peer_of(world.shm, address)]
    return int(row["identity"]), int(row["flags"])
