"""Network policies evaluated from raw manifests, slowly and plainly: a truth table's oracle.

Shares no code with the compiler: it reads dicts as YAML gives them and answers one question at a
time. What the API leaves open is answered as docs/policy.md says.
"""

import functools
import ipaddress

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPV6": 58, "GRE": 47}
ip_address = functools.cache(ipaddress.ip_address)
ip_network = functools.cache(ipaddress.ip_network)
UNKNOWN = object()  # a label of a pod that nobody has seen yet
CLUSTER = [ip_network("10.244.0.0/16"), ip_network("fd00:244::/48")]


def matches(selector, label, maybe):
    """A LabelSelector. label(key): value, None or UNKNOWN; maybe: what UNKNOWN conditions are."""
    selector = selector or {}
    conditions = [(k, "In", [v]) for k, v in (selector.get("matchLabels") or {}).items()]
    conditions += [
        (e["key"], e["operator"], e.get("values") or [])
        for e in selector.get("matchExpressions") or []
    ]
    for key, operator, values in conditions:
        value = label(key)
        if value is UNKNOWN:
            if not maybe:
                return False
            continue
        fits = {
            "In": value is not None and value in values,
            "NotIn": value is None or value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[operator]
        if not fits:
            return False
    return True


class Peer:
    """What is known of an address, or of a pod at this node."""

    def __init__(self, kind, pod=None, namespace=None, namespace_labels=None, reserved=()):
        self.kind, self.pod, self.namespace = kind, pod, namespace
        self.namespace_labels = namespace_labels or {}
        self.reserved = set(reserved)

    @property
    def is_pod(self):
        return self.namespace is not None

    @property
    def in_cluster(self):
        return self.kind in ("pod", "unseen", "container", "node")

    def pod_label(self, key):
        if self.kind == "unseen":
            return UNKNOWN
        return (self.pod["metadata"].get("labels") or {}).get(key)

    def namespace_label(self, key):
        return self.namespace_labels.get(key)

    def cilium_label(self, key):
        """Labels of all sources, as CiliumNetworkPolicy writes them."""
        if key.startswith("reserved:"):
            return "" if key.removeprefix("reserved:") in self.reserved else None
        key = key.removeprefix("k8s:").removeprefix("any:")
        if not self.is_pod:
            return None
        if key == "io.kubernetes.pod.namespace":
            return self.namespace
        prefix = "io.cilium.k8s.namespace.labels."
        if key.startswith(prefix):
            return self.namespace_label(key.removeprefix(prefix))
        if key == "io.cilium.k8s.policy.cluster":
            return "default"
        if key == "io.cilium.k8s.policy.serviceaccount":
            if self.kind == "unseen":
                return UNKNOWN
            return (self.pod.get("spec") or {}).get("serviceAccountName") or "default"
        return self.pod_label(key)

    def ports(self, protocol, name):
        """Numbers that a named port has."""
        found = set()
        for container in ((self.pod or {}).get("spec") or {}).get("containers") or []:
            for port in container.get("ports") or []:
                if (port.get("protocol", "TCP"), port.get("name")) == (protocol, name):
                    found.add(port["containerPort"])
        return found


class Oracle:
    """The cluster as manifests and this node's endpoints say it.

    endpoints: port -> (namespace, pod name or "", addresses).
    """

    def __init__(self, manifests, node, own_addresses, endpoints, cidr_match="kubernetes"):
        by_kind = {}
        for manifest in manifests:
            by_kind.setdefault(manifest["kind"], []).append(manifest)
        self.kinds, self.node, self.cidr_match = by_kind, node, cidr_match
        self.endpoints, self._met = endpoints, {}
        self.namespaces = {
            m["metadata"]["name"]: {
                **(m["metadata"].get("labels") or {}),
                "kubernetes.io/metadata.name": m["metadata"]["name"],
            }
            for m in by_kind.get("Namespace", [])
        }
        self.pods = {
            (m["metadata"].get("namespace", "default"), m["metadata"]["name"]): m
            for m in by_kind.get("Pod", [])
        }
        self.own = {ip_address(a) for a in own_addresses}
        self.remote = set()
        self.servers = {
            ip_address(address)
            for m in by_kind.get("EndpointSlice", [])
            if m["metadata"]["namespace"] == "default"
            if m["metadata"]["labels"]["kubernetes.io/service-name"] == "kubernetes"
            for e in m["endpoints"]
            for address in e["addresses"]
        }
        for m in by_kind.get("Node", []):
            mine = self.own if m["metadata"]["name"] == node else self.remote
            mine |= {
                ip_address(a["address"])
                for a in m["status"]["addresses"]
                if a["type"] == "InternalIP"
            }
            mine |= {ip_network(c)[1] for c in m["spec"]["podCIDRs"]}

    # --- who is who -------------------------------------------------------------------------------

    def labels_of(self, namespace):
        return self.namespaces.get(namespace, {"kubernetes.io/metadata.name": namespace})

    def endpoint(self, port):
        namespace, name, _ = self.endpoints[port]
        if not name:
            return Peer("container", reserved=["init"])
        pod = self.pods.get((namespace, name))
        if pod is None or (pod.get("spec") or {}).get("hostNetwork"):
            return Peer("unseen", None, namespace, self.labels_of(namespace), ["init"])
        return Peer("pod", pod, namespace, self.labels_of(namespace))

    def who(self, address):
        address = ip_address(address)
        server = ["kube-apiserver"] if address in self.servers else []
        if address in self.own:
            return Peer("node", reserved=["host", *server])
        if address in self.remote:
            return Peer("node", reserved=["remote-node", *server])
        for port, (_, _, addresses) in sorted(self.endpoints.items(), key=lambda e: str(e[0])):
            if address in {ip_address(a) for a in addresses}:
                return self.endpoint(port)
        attached = {(namespace, name) for namespace, name, _ in self.endpoints.values() if name}
        for place, pod in sorted(self.pods.items()):
            spec, status = pod.get("spec") or {}, pod.get("status") or {}
            over = status.get("phase") in ("Succeeded", "Failed")
            if spec.get("hostNetwork") or over or place in attached:
                continue
            if address in {ip_address(ip["ip"]) for ip in status.get("podIPs") or []}:
                return Peer("pod", pod, place[0], self.labels_of(place[0]))
        if server:
            return Peer("server", reserved=["kube-apiserver", "world"])
        if any(address in cidr for cidr in CLUSTER if cidr.version == address.version):
            return Peer("unmanaged", reserved=["unmanaged"])
        return Peer("world", reserved=[f"world-ipv{address.version}"])

    # --- the verdict ------------------------------------------------------------------------------

    def allowed(self, port, direction, address, protocol, number):
        """Whether the pod at a port may receive from ("ingress") or send to an address."""
        if address not in self._met:
            self._met[address] = self.who(address)
        subject, peer = self.endpoint(port), self._met[address]
        answers = list(self._network_policies(subject, direction, peer, address, protocol, number))
        answers += self._cilium_policies(subject, direction, peer, address, protocol, number)
        if "deny" in answers:
            return False
        if "allow" in answers:
            return True
        if "isolate" in answers:
            return direction == "ingress" and "host" in peer.reserved
        return True

    def _network_policies(self, subject, direction, peer, address, protocol, number):
        for policy in self.kinds.get("NetworkPolicy", []):
            spec, namespace = policy["spec"], policy["metadata"].get("namespace", "default")
            if subject.namespace != namespace:
                continue
            if not matches(spec.get("podSelector"), subject.pod_label, True):
                continue
            types = spec.get("policyTypes") or (
                ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]
            )
            if direction.capitalize() not in types:
                continue
            yield "isolate"
            if not matches(spec.get("podSelector"), subject.pod_label, False):
                continue  # not sure that it is meant: it gets nothing from it
            for rule in spec.get(direction) or []:
                peers = rule.get("from" if direction == "ingress" else "to")
                if peers and not any(self._np_peer(p, namespace, peer, address) for p in peers):
                    continue
                named = subject if direction == "ingress" else peer
                ports = rule.get("ports")
                if not ports or any(self._np_port(p, named, protocol, number) for p in ports):
                    yield "allow"

    def _np_peer(self, element, namespace, peer, address):
        if element.get("ipBlock"):
            block = element["ipBlock"]
            return self._in_block(block["cidr"], block.get("except") or [], peer, address)
        if not peer.is_pod:
            return False
        if "namespaceSelector" in element:
            if not matches(element["namespaceSelector"], peer.namespace_label, False):
                return False
        elif peer.namespace != namespace:
            return False
        return matches(element.get("podSelector"), peer.pod_label, False)

    def _in_block(self, cidr, excepts, peer, address):
        if peer.in_cluster and self.cidr_match == "cilium":
            return False
        address = ip_address(address)
        if "/" not in cidr:
            return ip_address(cidr) == address
        inside = address in ip_network(cidr, strict=False)
        return inside and not any(address in ip_network(e, strict=False) for e in excepts)

    def _np_port(self, port, named, protocol, number):
        if PROTOCOLS[port.get("protocol", "TCP")] != protocol:
            return False
        wanted = port.get("port")
        if wanted is None:
            return True
        if isinstance(wanted, str):
            return number in named.ports(port.get("protocol", "TCP"), wanted)
        return wanted <= number <= port.get("endPort", wanted)

    def _cilium_policies(self, subject, direction, peer, address, protocol, number):
        found = [(p, p["metadata"].get("namespace", "default"))
                 for p in self.kinds.get("CiliumNetworkPolicy", [])]  # fmt: skip
        found += [(p, None) for p in self.kinds.get("CiliumClusterwideNetworkPolicy", [])]
        for policy, namespace in found:
            specs = ([policy["spec"]] if policy.get("spec") else []) + (policy.get("specs") or [])
            for spec in specs:
                if namespace is not None and subject.namespace != namespace:
                    continue
                if not matches(spec["endpointSelector"], subject.cilium_label, True):
                    continue
                sure = matches(spec["endpointSelector"], subject.cilium_label, False)
                rules, denies = spec.get(direction), spec.get(f"{direction}Deny")
                default = bool(rules) or bool(denies)
                if (spec.get("enableDefaultDeny") or {}).get(direction, default):
                    yield "isolate"
                init = any(k.endswith("reserved:init") for k in _keys(spec["endpointSelector"]))
                for answer, some in (("allow", rules), ("deny", denies)):
                    for rule in some or []:
                        if answer == "allow" and not sure:
                            continue
                        named = subject if direction == "ingress" else peer
                        maybe = answer == "deny"
                        if self._cilium_rule(
                            rule, direction, namespace, init, peer, address, maybe
                        ) and self._cilium_ports(rule, named, protocol, number):
                            yield answer

    def _cilium_rule(self, rule, direction, namespace, init, peer, address, maybe):
        way = "from" if direction == "ingress" else "to"
        names = ("Endpoints", "CIDR", "CIDRSet", "Entities", "Services")
        members = {n: rule[way + n] for n in names if rule.get(way + n) is not None}
        if not members:
            return bool(rule.get("toPorts") or rule.get("icmps"))
        for one in members.get("Endpoints", []):
            if self._endpoint(one, namespace, init, peer, maybe):
                return True
        if any(self._in_block(c, [], peer, address) for c in members.get("CIDR", [])):
            return True
        for one in members.get("CIDRSet", []):
            if self._in_block(one["cidr"], one.get("except") or [], peer, address):
                return True
        if any(self._entity(one, peer) for one in members.get("Entities", [])):
            return True
        return any(self._service(one, namespace, address) for one in members.get("Services", []))

    def _endpoint(self, selector, namespace, init, peer, maybe):
        keys = [k.removeprefix("k8s:").removeprefix("any:") for k in _keys(selector)]
        if not any(k.startswith("reserved:") for k in keys):
            says = any(k == "io.kubernetes.pod.namespace" for k in keys)
            of_namespace = any(k.startswith("io.cilium.k8s.namespace.labels.") for k in keys)
            if namespace is None:
                if not says and not init and not peer.is_pod:
                    return False
            elif not says and not of_namespace and peer.namespace != namespace:
                return False
        return matches(selector, peer.cilium_label, maybe)

    def _entity(self, entity, peer):
        if entity in ("all", "none"):
            return entity == "all"
        if entity == "world":
            return bool(peer.reserved & {"world", "world-ipv4", "world-ipv6"})
        if entity == "cluster":
            names = {"host", "remote-node", "init", "ingress", "health", "unmanaged"}
            return peer.is_pod or bool(peer.reserved & (names | {"kube-apiserver"}))
        return entity in peer.reserved

    def _service(self, one, namespace, address):
        services = {(m["metadata"]["namespace"], m["metadata"]["name"]): m
                    for m in self.kinds.get("Service", [])}  # fmt: skip
        if one.get("k8sService"):
            ref = one["k8sService"]
            wanted = {(ref.get("namespace") or namespace, ref["serviceName"])}
        else:
            ref = one["k8sServiceSelector"]
            where = ref.get("namespace") or namespace
            wanted = {
                place
                for place, m in services.items()
                if where in (None, place[0])
                if matches(ref["selector"], (m["metadata"].get("labels") or {}).get, False)
            }
        return any(
            ip_address(address) in map(ip_address, endpoint["addresses"])
            for m in self.kinds.get("EndpointSlice", [])
            for endpoint in m["endpoints"]
            if (m["metadata"]["namespace"],
                m["metadata"]["labels"]["kubernetes.io/service-name"]) in wanted
        )  # fmt: skip

    def _cilium_ports(self, rule, named, protocol, number):
        if not rule.get("toPorts") and not rule.get("icmps"):
            return True
        for one in rule.get("toPorts") or []:
            for port in one.get("ports") or []:
                name = port.get("protocol", "ANY").upper()
                names = ["TCP", "UDP", "SCTP"] if name == "ANY" else [name]
                if any(self._cilium_port(port, n, named, protocol, number) for n in names):
                    return True
        types = {"EchoRequest": {1: 8, 58: 128}}
        for one in rule.get("icmps") or []:
            for field in one.get("fields") or []:
                wanted = 58 if field.get("family") == "IPv6" else 1
                number_of = types.get(field["type"], {wanted: field["type"]})[wanted]
                if (protocol, number) == (wanted, int(number_of)):
                    return True
        return False

    def _cilium_port(self, port, name, named, protocol, number):
        if PROTOCOLS[name] != protocol:
            return False
        given = str(port.get("port", "0"))
        if not given.isdecimal():
            return number in named.ports(name, given.lower())
        if given == "0":
            return True
        return int(given) <= number <= (port.get("endPort") or int(given))


def _keys(selector):
    selector = selector or {}
    found = list(selector.get("matchLabels") or {})
    return found + [e["key"] for e in selector.get("matchExpressions") or []]
