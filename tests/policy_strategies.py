"""Random policies of all kinds, and random changes of a small cluster, out of a random.Random.

Plain functions rather than strategies: hypothesis picks the seed, and policies come out rich.
"""

from random import Random

from tests.policy_world import namespace, node, pod, policy, slice_of

NAMESPACES = ("x", "y", "z")
LABELS = {"app": ("a", "b", "c"), "tier": ("front", "back")}
NAMED = (("http", 80, "TCP"), ("http", 8080, "TCP"), ("dns", 53, "UDP"), ("http", 80, "SCTP"))
PORTS = ((6, 80), (6, 8080), (6, 443), (17, 53), (132, 80), (1, 8), (58, 128), (47, 0))
WORLD = (
    "10.1.2.3", "10.1.128.1", "8.8.8.8", "172.16.0.9", "2001:db8:1::1", "2001:db8:2::1",
    "10.244.1.200", "10.244.9.9",
)  # fmt: skip
BLOCKS = (
    ("0.0.0.0/0", ("10.0.0.0/8", "10.244.1.0/24", "192.0.2.0/24")),
    ("10.0.0.0/8", ("10.1.128.0/17", "10.244.0.0/16", "10.244.1.2/32")),
    ("10.1.0.0/16", ("10.1.2.3/32",)),
    ("10.244.1.0/24", ("10.244.1.2/32", "10.244.1.4/32")),
    ("192.0.2.2/32", ()),
    ("::/0", ("fd00:244::/48", "2001:db8::/32")),
    ("2001:db8::/32", ("2001:db8:1::/48",)),
    ("fd00:244:0:1::/64", ("fd00:244:0:1::2/128",)),
)
NAMESPACE_LABELS = {"team": ("red", "blue"), "kubernetes.io/metadata.name": NAMESPACES}
CILIUM_LABELS = {
    **LABELS,
    "io.kubernetes.pod.namespace": NAMESPACES,
    "io.cilium.k8s.namespace.labels.team": ("red", "blue"),
}
ENTITIES = (
    "all", "world", "world-ipv4", "cluster", "host", "remote-node", "kube-apiserver", "init",
    "unmanaged", "none",
)  # fmt: skip


def some(r: Random, things, most: int, least: int = 0) -> list:
    """Return a few different things."""
    return r.sample(list(things), min(len(things), r.randint(least, most)))


def label_selector(r: Random, labels=LABELS, sources=("",)) -> dict:
    found: dict = {}
    for key in some(r, sorted(labels), 2):
        name = r.choice(sources) + key
        operator = r.choice(["label", "label", "In", "NotIn", "Exists", "DoesNotExist"])
        if operator == "label":
            found.setdefault("matchLabels", {})[name] = r.choice(labels[key])
            continue
        expression: dict = {"key": name, "operator": operator}
        if operator in ("In", "NotIn"):
            expression["values"] = some(r, labels[key], 2, 1)
        found.setdefault("matchExpressions", []).append(expression)
    return found


def block(r: Random) -> dict:
    cidr, parts = r.choice(BLOCKS)
    found = {"cidr": cidr}
    if parts and r.random() < 0.6:
        found["except"] = some(r, parts, 2, 1)
    return found


def np_peer(r: Random) -> dict:
    kind = r.randrange(5)
    if kind == 0:
        return {"ipBlock": block(r)}
    found = {}
    if kind < 4:
        found["podSelector"] = label_selector(r)
    if kind > 2:
        found["namespaceSelector"] = label_selector(r, NAMESPACE_LABELS)
    return found


def np_port(r: Random) -> dict:
    kind = r.randrange(4)
    if kind == 0:
        return r.choice([{}, {"protocol": "UDP"}, {"protocol": "SCTP"}])
    if kind == 1:
        first = r.choice([1, 79, 80, 400])
        return {"port": first, "endPort": first + r.choice([0, 1, 50, 8000])}
    port = r.choice([53, 80, 8080, "http", "http", "dns"])
    return {"protocol": r.choice(["TCP", "TCP", "UDP", "SCTP"]), "port": port}


def np_rule(r: Random, way: str) -> dict:
    rule = {}
    if r.random() < 0.8:
        rule[way] = [np_peer(r) for _ in range(r.randint(0, 2))]
    if r.random() < 0.6:
        rule["ports"] = [np_port(r) for _ in range(r.randint(0, 2))]
    return rule


def network_policy(r: Random) -> dict:
    spec: dict = {"podSelector": label_selector(r)}
    types = r.choice([None, ["Ingress"], ["Egress"], ["Ingress", "Egress"]])
    if types:
        spec["policyTypes"] = types
    for name, way in (("ingress", "from"), ("egress", "to")):
        if r.random() < 0.7:
            spec[name] = [np_rule(r, way) for _ in range(r.randint(0, 2))]
    return policy(r.choice(NAMESPACES), f"np-{r.choice('pq')}", spec)


def cilium_peers(r: Random, way: str) -> dict:
    kind = r.randrange(7)
    if kind < 2:
        sources = ("", "k8s:", "any:")
        found = [label_selector(r, CILIUM_LABELS, sources) for _ in range(r.randint(0, 2))]
        return {f"{way}Endpoints": found}
    if kind == 2:
        return {f"{way}CIDR": some(r, [*(cidr for cidr, _ in BLOCKS), "8.8.8.8"], 2)}
    if kind == 3:
        return {f"{way}CIDRSet": [block(r) for _ in range(r.randint(0, 2))]}
    if kind == 4:
        return {f"{way}Entities": some(r, ENTITIES, 2)}
    if kind == 5 and way == "to":
        named = {"k8sService": {"serviceName": "s", "namespace": "y"}}
        labelled = {"k8sServiceSelector": {"selector": {"matchLabels": {"kind": "db"}}}}
        return {"toServices": [r.choice([named, labelled])]}
    return {}


def cilium_ports(r: Random) -> dict:
    kind = r.randrange(5)
    if kind == 0:
        fields = [{"type": 8}, {"family": "IPv6", "type": "EchoRequest"}]
        return {"icmps": [{"fields": some(r, fields, 2)}]}
    if kind < 3:
        return {}
    ports = []
    for _ in range(r.randint(0, 2)):
        number = r.choice(["0", "53", "80", "8080", "http", "http", "DNS"])
        ports.append({"port": number, "protocol": r.choice(["TCP", "UDP", "ANY", "sctp"])})
    extra = [{"port": "1", "endPort": 1000, "protocol": "TCP"}, {"port": "443"}]
    return {"toPorts": [{"ports": [*ports, *some(r, extra, 1)]}]}


def cilium_policy(r: Random) -> dict:
    clusterwide = r.random() < 0.4
    labels = CILIUM_LABELS if clusterwide else LABELS
    spec: dict = {"endpointSelector": label_selector(r, labels, ("", "k8s:"))}
    for name, way in (("ingress", "from"), ("egress", "to")):
        for field in (name, f"{name}Deny"):
            if r.random() < (0.3 if field.endswith("Deny") else 0.6):
                rules = range(r.randint(0, 2))
                spec[field] = [{**cilium_peers(r, way), **cilium_ports(r)} for _ in rules]
    if len(spec) == 1:
        spec["ingress"] = [{}]
    if r.random() < 0.3:
        spec["enableDefaultDeny"] = {r.choice(["ingress", "egress"]): r.random() < 0.5}
    if clusterwide:
        return policy("", f"ccnp-{r.choice('pq')}", spec, "CiliumClusterwideNetworkPolicy")
    name = f"cnp-{r.choice('pq')}"
    return policy(r.choice(NAMESPACES), name, spec, "CiliumNetworkPolicy")


def any_policy(r: Random) -> dict:
    return r.choice([network_policy, cilium_policy])(r)


def any_pod(r: Random, place: int) -> dict:
    """The pod of one of nine places, every second on node 1, with labels and ports of its own."""
    labels = {key: r.choice(values) for key, values in LABELS.items() if r.random() < 0.8}
    ports = {(name, protocol): (name, n, protocol) for name, n, protocol in some(r, NAMED, 3)}
    where, name = NAMESPACES[place // 3], f"p{place % 3 + 1}"
    return pod(where, name, 2 + place, place % 2 + 1, ports.values(), **labels)


def any_namespace(r: Random, name: str) -> dict:
    return namespace(name, **r.choice([{}, {"team": "red"}, {"team": "blue"}]))


def fill(r: Random, world) -> None:
    """Begin with nine pods, five of them on this node, and a few policies."""
    world.manifests.clear()
    world.endpoints.clear()
    world.put(node(1), node(2), *(any_namespace(r, name) for name in NAMESPACES))
    for place in range(9):
        one = any_pod(r, place)
        world.put(one)
        if one["spec"]["nodeName"] == "n1":
            world.attach(place + 3, one)
    world.put(*(any_policy(r) for _ in range(r.randint(0, 6))))


def change(r: Random, world) -> str:
    """Make one change of the cluster; return what it was."""
    pods = [m for m in world.manifests.values() if m["kind"] == "Pod"]
    rules = [m for m in world.manifests.values() if "Policy" in m["kind"]]
    what = r.choice(
        ["policy"] * 6 + ["no policy"] * 3 + ["pod"] * 4 + ["namespace", "no pod"] * 2 + ["over",
        "host", "attach", "detach", "server", "service", "node", "no node", "container"]
    )  # fmt: skip
    place = r.randrange(9)
    one = any_pod(r, place)
    if what == "policy":
        world.put(any_policy(r))
    elif what == "no policy" and rules:
        world.drop(r.choice(rules))
    elif what == "namespace":
        world.put(any_namespace(r, r.choice(NAMESPACES)))
    elif what in ("pod", "over", "host"):
        one["status"]["phase"] = "Succeeded" if what == "over" else "Running"
        one["spec"]["hostNetwork"] = what == "host"
        world.put(one)
    elif what == "no pod" and pods:
        world.drop(r.choice(pods))
    elif what == "attach":
        world.attach(place + 3, one)
    elif what == "container":
        world.endpoints[50] = "", "", (f"10.244.1.{60 + place}",)
    elif what == "detach" and world.endpoints:
        del world.endpoints[r.choice(sorted(world.endpoints))]
    elif what == "server":
        world.put(slice_of("default", "kubernetes", some(r, [*WORLD[:3], "192.0.2.2"], 2)))
    elif what == "service":
        metadata = {"name": "s", "namespace": "y", "labels": r.choice([{}, {"kind": "db"}])}
        world.put({"kind": "Service", "metadata": metadata, "spec": {}})
        world.put(slice_of("y", "s", some(r, [*WORLD[:4], "10.244.1.2", "10.244.2.3"], 3)))
    elif what == "node":
        world.put(node(2))
    elif what == "no node":
        world.manifests.pop(("Node", None, "n2"), None)
    return what
