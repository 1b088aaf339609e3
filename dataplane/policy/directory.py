"""Who holds which address: pods, endpoints, nodes, the API server.

Rule: an address has one holder: a node before an endpoint of this node before a Pod object before
the API server; of equals the first by name, and the rest is told as a problem.

Theory. Objects and endpoints become records, records claim addresses, and the winner of each
address is told to the partition. Only records whose source changed are made again: an object that
is the same Python object is taken for unchanged, so a source that keeps what it has parsed makes a
turn cheap. Pods of the host network are the node; pods that are over have lost their addresses; of
an endpoint whose Pod object is not there only the namespace is known.
"""

from collections.abc import Iterable, Mapping

from dataplane.objects.collect import Objects, diff
from dataplane.objects.core import Node, Pod
from dataplane.objects.policies import NUMBERS
from dataplane.policy.kinds import (
    HOST,
    KEEP_SOURCE,
    POD,
    REMOTE_NODE,
    Holder,
    Identity,
    NamedPort,
)
from dataplane.policy.labels import (
    Labels,
    hashed,
    namespace_labels,
    pod_labels,
    relevant,
    reserved,
    unknown_labels,
)
from dataplane.policy.networks import Roles
from dataplane.policy.options import LocalEndpoint, LocalView
from dataplane.policy.partition import Partition
from dataplane.policy.prefixes import CLUSTER, KEEP, address_of, key, number_of
from xdp.abi import value

Owner = tuple[int, str, str]  # rank, namespace, name
Address = tuple[int, int]  # family, value
OF_NODE, OF_ENDPOINT, OF_POD, OF_SERVER = range(4)
API_SERVER = ("default", "kubernetes")  # namespace and name of its service
TOLD_MOST = 3  # of a kind of problem
FIRST_LEAST = 10_000  # identities remembered by number before those that are gone are forgotten


class Directory:
    """Holders of addresses, and the local endpoints' identities."""

    def __init__(self, partition: Partition) -> None:
        """Nobody holds anything yet."""
        self._partition, self._selection = partition, partition.selection
        self._objects, self._local = Objects(), LocalView("")
        self._started = False
        self._claims: dict[Address, tuple[Owner, ...]] = {}
        self._records: dict[Owner, dict[Address, Holder]] = {}
        self._holders: dict[Owner, Holder] = {}
        self._given: dict[str, Labels] = {}
        self._by_namespace: dict[str, set[str]] = {}  # pods
        self._of_pod: dict[tuple[str, str], set[int]] = {}  # endpoints: ports
        self._allocated: dict[frozenset[tuple[str, str]], int] = {}
        self._first: dict[int, Identity] = {}  # of a number
        self._alike: dict[int, tuple[Identity, Identity]] = {}
        self._contested: set[Address] = set()
        self._servers: frozenset[Address] = frozenset()
        self._fixed: dict[tuple[str, ...], Holder] = {}
        self.endpoints: dict[int, LocalEndpoint] = {}
        self.holders: dict[int, Holder] = {}  # of endpoints, by port

    # --- the update -------------------------------------------------------------------------------

    def update(self, objects: Objects, local: LocalView) -> set[int]:
        """Take what is new; return the ports whose endpoint is another or something else."""
        old, before = self._objects, self._local
        self._objects, self._local = objects, local
        self._read_nodes(old, before)
        again = self._renumber(old)
        changed = again | objects.changed(old, "pods")
        for name in objects.changed(old, "namespaces"):
            self._given.pop(name, None)
            changed |= {(name, pod) for pod in self._by_namespace.get(name, ())}
            changed |= {place for place in self._of_pod if place[0] == name}
        ports = self._change_endpoints(local, changed)
        for place in changed:
            ports |= self._read_pod(place)
        for port in ports:
            self._read_endpoint(port)
        return ports

    def _change_endpoints(self, local: LocalView, pods: set[tuple[str, str]]) -> set[int]:
        """Take the endpoints; return the ports where it is another one. pods: gets theirs."""
        wanted = {endpoint.port: endpoint for endpoint in local.endpoints}
        changed = diff(self.endpoints, wanted)
        for port in changed:
            old, new = self.endpoints.get(port), wanted.get(port)
            if old is not None:
                self._of_pod[old.namespace, old.pod].discard(port)
                if not self._of_pod[old.namespace, old.pod]:
                    del self._of_pod[old.namespace, old.pod]
                pods.add((old.namespace, old.pod))
            if new is not None:
                pods.add((new.namespace, new.pod))
                self._of_pod.setdefault((new.namespace, new.pod), set()).add(port)
        self.endpoints = wanted
        return changed

    # --- pods -------------------------------------------------------------------------------------

    def _labels_of(self, namespace: str) -> Labels:
        found = self._given.get(namespace)
        if found is None:
            found = namespace_labels(namespace, self._objects.namespaces.get(namespace))
            self._given[namespace] = found
        return found

    def _read_pod(self, place: tuple[str, str]) -> set[int]:
        """Make a pod's record again; return the ports of its endpoints."""
        namespace, name = place
        owner: Owner = (OF_POD, namespace, name)
        pod = self._objects.pods.get(place)
        if pod is None:
            self._by_namespace.get(namespace, set()).discard(name)
        else:
            self._by_namespace.setdefault(namespace, set()).add(name)
        ports = self._of_pod.get(place, set()) if name else set()
        if pod is None or pod.host_network or (pod.over and not ports):
            self._record(owner, None, ())
        else:
            mine = () if ports else pod.ips  # its endpoint knows better
            self._record(owner, self._pod_holder(pod), map(number_of, mine))
        return set(ports)

    def _pod_holder(self, pod: Pod) -> Holder:
        labels = pod_labels(pod, self._labels_of(pod.namespace))
        numbers: set[tuple[NamedPort, int]] = {
            ((NUMBERS[port.protocol], port.name.lower()), port.number)
            for port in pod.ports
            if port.name
        }
        return self._holder(labels, f"{pod.namespace}/{pod.name}", frozenset(numbers))

    def _holder(
        self,
        labels: Labels,
        name: str,
        numbers: frozenset[tuple[NamedPort, int]] = frozenset(),
        unknown: bool = False,
    ) -> Holder:
        """Return a holder of a pod's labels, with a hold on its identity."""
        identity = self._selection.identity(labels, unknown=unknown)
        if not identity.number:
            identity.number = self._number(identity)
        ports = self._selection.ports(numbers)
        return Holder(identity, ports, POD | KEEP_SOURCE, identity.number, True, name)

    def _read_endpoint(self, port: int) -> None:
        """Make an endpoint's record again."""
        endpoint = self.endpoints.get(port)
        owner: Owner = (OF_ENDPOINT, "", str(port))
        if endpoint is None:
            self.holders.pop(port, None)
            self._record(owner, None, ())
            return
        pod = self._objects.pods.get((endpoint.namespace, endpoint.pod)) if endpoint.pod else None
        name = f"{endpoint.namespace}/{endpoint.pod}"
        if pod is not None and not pod.host_network:
            holder = self._pod_holder(pod)
        elif endpoint.pod:
            given = unknown_labels(self._labels_of(endpoint.namespace))
            holder = self._holder(given, name, unknown=True)
        else:
            holder = self._holder(reserved("init"), f"container at port {port}")
        self.holders[port] = holder
        self._record(owner, holder, map(number_of, endpoint.addresses))

    # --- numbers of identities --------------------------------------------------------------------

    def _number(self, identity: Identity) -> int:
        if "reserved:init" in identity.labels:
            return value("IDENTITY_INIT")
        security = relevant(identity.labels)
        number = self._allocated.get(frozenset(security.items()))
        number = number or self._allocated.get(frozenset(identity.labels.items()))
        if number:
            return number
        number = hashed(security)
        if len(self._first) > 2 * self._selection.count + FIRST_LEAST:
            self._first = {n: one for n, one in self._first.items() if one.refs}
        first = self._first.setdefault(number, identity)
        if first is not identity and relevant(first.labels) != security:
            self._alike[number] = first, identity
        return number

    def _renumber(self, old: Objects) -> set[tuple[str, str]]:
        """Take the CiliumIdentity objects; return the pods that have other numbers by that."""
        changed = self._objects.changed(old, "identities")
        if not changed:
            return set()
        found = self._objects.identities.values()
        self._allocated = {frozenset(one.labels.items()): one.number for one in found}
        for name in changed:
            one = self._objects.identities.get(name)
            number = int(name)
            had = self._fixed.pop(("identity", name), None)
            holder = None
            if one is not None:
                identity = self._selection.identity(one.labels, one.number)
                ports = self._selection.ports(frozenset())
                flags = POD | KEEP_SOURCE
                holder = Holder(identity, ports, flags, number, True, f"identity {name}")
                self._fixed["identity", name] = holder
            self._partition.hold_identity(number, holder)
            self._let_go(had)
        again = set()
        for (rank, namespace, pod), holder in self._holders.items():
            number = self._number(holder.identity) if rank in (OF_POD, OF_ENDPOINT) else 0
            if number and number != holder.number:
                holder.identity.number = number
                end = self.endpoints[int(pod)] if rank == OF_ENDPOINT else None
                again.add((end.namespace, end.pod) if end else (namespace, pod))
        return again

    # --- nodes ------------------------------------------------------------------------------------

    def _read_nodes(self, old: Objects, before: LocalView) -> None:
        objects, local = self._objects, self._local
        servers = self._servers
        if any(place[0] == API_SERVER[0] for place in objects.changed(old, "slices")):
            servers = frozenset(
                number_of(endpoint.address)
                for one in objects.slices.values()
                if (one.namespace, one.service) == API_SERVER
                for endpoint in one.endpoints
            )
        changed = objects.changed(old, "nodes")
        same = self._started and servers == self._servers and before.node == local.node
        if not changed and same and before.addresses == local.addresses:
            if (before.clusters, before.keep_source) == (local.clusters, local.keep_source):
                return
        self._start(local)
        if not same:
            changed = {*objects.nodes, *old.nodes}
        self._servers = servers
        for name in changed | {before.node, local.node}:
            self._read_node(name, objects.nodes.get(name))
        outside = self._reserved(("kube-apiserver", "world"), value("IDENTITY_KUBE_APISERVER"), 0)
        self._record((OF_SERVER, "", ""), outside, servers)
        self._roles(local, objects.nodes)

    def _read_node(self, name: str, node: Node | None) -> None:
        local = self._local
        mine = bool(name) and name == local.node
        addresses = set(map(number_of, local.addresses)) if mine else set()
        if node is not None:
            addresses |= set(map(number_of, node.internal_ips))
            addresses |= {number_of(cidr.network_address + 1) for cidr in node.pod_cidrs}
        if mine:
            names, number, flags = ("host",), value("IDENTITY_HOST"), HOST
        else:
            names, number, flags = ("remote-node",), value("IDENTITY_REMOTE_NODE"), REMOTE_NODE
        plain = self._reserved(names, number, flags | KEEP_SOURCE)
        if not mine:
            number = value("IDENTITY_KUBE_APISERVER")
        server = self._reserved((*names, "kube-apiserver"), number, flags | KEEP_SOURCE)
        record = {at: server if at in self._servers else plain for at in addresses}
        self._claim((OF_NODE, "", name), record)

    def _reserved(self, names: tuple[str, ...], number: int, flags: int) -> Holder:
        """Return the holder of a reserved identity, always the same."""
        holder = self._fixed.get(names)
        if holder is None:
            identity = self._selection.identity(reserved(*names), number)
            ports = self._selection.ports(frozenset())
            cluster = bool(flags & (HOST | REMOTE_NODE))
            holder = Holder(identity, ports, flags, number, cluster, f"reserved:{names[0]}")
            self._fixed[names] = holder
        return holder

    def _start(self, local: LocalView) -> None:
        """Say what addresses are that nobody holds."""
        both = {cidr.version for cidr in local.clusters} == {4, 6}
        world = {}
        for family in (4, 6):
            name = f"world-ipv{family}" if both else "world"
            number = value("IDENTITY_" + name.upper().replace("-", "_"))
            world[family] = self._reserved((name,), number, 0)
        if not self._started or world != self._partition.world:
            unmanaged = self._reserved(("unmanaged",), value("IDENTITY_UNMANAGED"), 0)
            self._partition.start(world, unmanaged)
            self._started = True

    def _roles(self, local: LocalView, nodes: Mapping[str, Node]) -> None:
        roles: Roles = {(cidr.version, *key(cidr)): KEEP for cidr in local.keep_source}
        for cidr in local.clusters:
            roles[cidr.version, *key(cidr)] = KEEP | CLUSTER
        for node in nodes.values():
            for cidr in node.pod_cidrs:
                roles[cidr.version, *key(cidr)] = KEEP | CLUSTER
        self._partition.networks.set_roles(roles)

    # --- records and claims -----------------------------------------------------------------------

    def _record(self, owner: Owner, holder: Holder | None, addresses: Iterable[Address]) -> None:
        """Replace an owner's record; None: it goes."""
        had = self._holders.pop(owner, None)
        if holder is None:
            self._claim(owner, {})
        else:
            self._holders[owner] = holder
            self._claim(owner, dict.fromkeys(addresses, holder))
        if owner[0] in (OF_POD, OF_ENDPOINT):
            self._let_go(had)

    def _let_go(self, holder: Holder | None) -> None:
        if holder is not None:
            self._selection.release(holder.identity)
            self._selection.release(holder.ports)

    def _claim(self, owner: Owner, record: dict[Address, Holder]) -> None:
        had = self._records.pop(owner, {})
        if record:
            self._records[owner] = record
        for address in had.keys() - record.keys():
            left = tuple(one for one in self._claims[address] if one != owner)
            if left:
                self._claims[address] = left
            else:
                del self._claims[address]
            self._settle(address)
        for address in record:
            claims = self._claims.get(address)
            if claims is None:
                self._claims[address] = (owner,)
            elif owner not in claims:
                self._claims[address] = tuple(sorted((*claims, owner)))
            self._settle(address)

    def _settle(self, address: Address) -> None:
        """Tell the partition who holds an address."""
        claims = self._claims.get(address)
        if claims is not None and len(claims) > 1 and claims[0][0] == claims[1][0]:
            self._contested.add(address)
        elif self._contested:
            self._contested.discard(address)
        self._partition.hold(*address, self._records[claims[0]][address] if claims else None)

    def problems(self) -> list[str]:
        """Return what is contradictory, briefly."""
        found = []
        for address in sorted(self._contested)[:TOLD_MOST]:
            names = [self._records[one][address].name for one in self._claims[address]]
            text = f"address {address_of(*address)} is claimed by {' and '.join(names)}"
            found.append(f"{text}: policy takes it for the first; correct status.podIPs")
        if len(self._contested) > TOLD_MOST:
            found.append(f"{len(self._contested)} addresses are claimed by several in all")
        return found

    def alike(self) -> dict[int, tuple[Labels, Labels]]:
        """Return numbers that stand for several sets of labels, with two of these.

        Flows cannot tell them apart, verdicts can: these go by address (decision 7).
        """
        pairs = self._alike.items()
        return {n: (a.labels, b.labels) for n, (a, b) in pairs if a.refs and b.refs}

    def holder(self, address: Address) -> Holder | None:
        """Return who holds an address."""
        claims = self._claims.get(address)
        return self._records[claims[0]][address] if claims else None
