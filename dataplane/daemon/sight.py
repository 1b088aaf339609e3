"""The agent as metrics and the web page see it.

Rule: wiring only; what a scrape needs is gathered here, once a scrape.

Theory. Names of addresses follow from the objects and are made anew only when these have changed,
since a cluster has many more pods than this node shows.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dataplane.daemon.engines import RULES
from dataplane.metrics.facts import Facts, Owner
from dataplane.objects.collect import Objects

if TYPE_CHECKING:
    from dataplane.daemon.agent import Agent


class Witness:
    """Gathers Facts of an agent."""

    def __init__(self, agent: "Agent") -> None:
        """agent: with all its parts."""
        self._agent = agent
        self._objects: Objects | None = None
        self._names: Mapping[str, str] = {}

    async def facts(self) -> Facts:
        """Return the agent as it is now."""
        agent = self._agent
        state = await agent.status()
        return Facts(
            node=agent.config.node.name,
            ready=state["ready"],
            forwarder=state["forwarder"],
            owners=self.owners(),
            endpoints={
                end.number: Owner(end.pod_namespace, end.pod_name) for end in agent.endpoints
            },
            addresses=self._called(agent.objects),
            tables=agent.reconciler.usage() | agent.engines.usage(),
            pools=tuple(agent.ipam.usage()),
            policies=len(agent.objects.policies),
            nodes=len(agent.objects.nodes),
            problems=tuple(state["errors"]),
            rules=agent.shm.folder / RULES,
        )

    def owners(self) -> dict[str, Owner]:
        """Return whose devices are."""
        ends = self._agent.endpoints
        return {end.host_ifname: Owner(end.pod_namespace, end.pod_name) for end in ends}

    def _called(self, objects: Objects) -> Mapping[str, str]:
        if objects is not self._objects:
            self._objects, self._names = objects, names(objects)
        return self._names


def names(objects: Objects) -> dict[str, str]:
    """Return what addresses are called: nodes, services, pods; a pod's own name wins."""
    found: dict[str, str] = {}
    for node in objects.nodes.values():
        found |= {str(address): f"node {node.name}" for address in node.internal_ips}
    for service in objects.services.values():
        called = f"service {service.namespace}/{service.name}"
        found |= {str(address): called for address in service.cluster_ips}
    for pod in objects.pods.values():
        if not pod.host_network and not pod.over:
            found |= {str(address): f"{pod.namespace}/{pod.name}" for address in pod.ips}
    return found
