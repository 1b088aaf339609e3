"""unbound as kube-dns of a laboratory: zones that may change while it runs.

Rule: it is the only server of its zones, and keeps no answer: what a zone says now is what it says.

Theory. Debian's package would start a service and enable it for ever, and its AppArmor profile lets
that program read no other configuration, so the Makefile only unpacks it into build/unbound; an
installed one is used where that is missing. Each zone is an auth-zone that the iterator asks, so a
CNAME is followed from zone to zone as it would be on the Internet.
"""

import shutil
import signal
from pathlib import Path
from typing import Any

import yaml

from bench.lab import ROOT, LabError, Namespace, Process, eventually
from bench.penstock import Cluster, Pod

ADDRESSES = {4: "10.96.0.53", 6: "fd00:96::53"}  # of the service
UNPACKED = ROOT / "build" / "unbound" / "usr" / "sbin" / "unbound"
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec:
  type: ClusterIP
  clusterIP: 10.96.0.53
  clusterIPs: [10.96.0.53, "fd00:96::53"]
  ipFamilies: [IPv4, IPv6]
  ports:
  - {name: dns, port: 53, targetPort: 53, protocol: UDP}
  - {name: dns-tcp, port: 53, targetPort: 53, protocol: TCP}
"""
SLICE = """
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: kube-system, labels: {kubernetes.io/service-name: kube-dns}}
ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]
"""
_CONFIG = """
server:
  interface: 0.0.0.0
  interface: ::0
  access-control: 0.0.0.0/0 allow
  access-control: ::/0 allow
  chroot: ""
  username: ""
  directory: "{folder}"
  pidfile: ""
  use-syslog: no
  logfile: ""
  module-config: "iterator"
  cache-max-ttl: 0
  do-daemonize: no
  max-udp-size: 4096
  num-queries-per-thread: 4096
  so-rcvbuf: 4m
  domain-insecure: "."
remote-control:
  control-enable: no
"""
_ZONE = """
auth-zone:
  name: "{name}."
  zonefile: "{file}"
  for-upstream: yes
  for-downstream: no
  fallback-enabled: no
"""


class Resolver:
    """An unbound in a namespace. zones: origin -> records, one a line."""

    def __init__(self, space: Namespace, zones: dict[str, str]) -> None:
        """Start it and wait for its first answer; LabError when none comes."""
        self.space, self.zones = space, dict(zones)
        self.folder = Path(space.lab.folder) / f"{space.short}-unbound"
        self.folder.mkdir()
        self._write()
        config = _CONFIG.format(folder=self.folder)
        config += "".join(_ZONE.format(name=name, file=self._file(name)) for name in zones)
        (self.folder / "unbound.conf").write_text(config)
        self.process: Process = space.spawn(_program(), "-c", str(self.folder / "unbound.conf"))
        eventually(self._answers, "unbound", 20)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.zone"

    def _write(self) -> None:
        for name, records in self.zones.items():
            head = f"$ORIGIN {name}.\n$TTL 5\n@ SOA ns a 1 60 60 600 5\n@ NS ns\nns A 127.0.0.1\n"
            self._file(name).write_text(head + records + "\n")

    def _answers(self) -> bool:
        name = next(iter(self.zones))
        try:
            words = ("+time=1", "+tries=1", "+short", name, "SOA")
            return "ns." in self.space.run("dig", "@127.0.0.1", *words)
        except LabError:
            return False

    def change(self, name: str, records: str) -> None:
        """Give a zone other records."""
        self.zones[name] = records
        self._write()
        self.process.popen.send_signal(signal.SIGHUP)


def publish(cluster: Cluster, pod: Pod) -> None:
    """Make a pod's port 53, UDP and TCP, the service of ADDRESSES."""
    objects = [yaml.safe_load(SERVICE)]
    for family in ADDRESSES:
        one: dict[str, Any] = yaml.safe_load(SLICE)
        one["metadata"]["name"] = f"kube-dns-v{family}"
        one["addressType"] = f"IPv{family}"
        one["endpoints"] = [{"addresses": [pod.addresses[family]], "nodeName": pod.node.name}]
        objects.append(one)
    cluster.apply("kube-dns", *objects)


def _program() -> str:
    found = str(UNPACKED) if UNPACKED.is_file() else shutil.which("unbound")
    if not found:
        raise LabError(f"unbound is not there: `make run` unpacks it into {UNPACKED.parents[2]}")
    return found
