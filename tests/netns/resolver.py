"""unbound as kube-dns of a laboratory: zones that tests may change while it runs."""

import signal
from pathlib import Path

from bench.lab import LabError, Namespace, Process, eventually
from bench.penstock import Cluster, Pod
from tests.netns.manifests import service, slices

ADDRESSES = {4: "10.96.0.53", 6: "fd00:96::53"}  # of the service
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
        self.space, self.zones = space, dict(zones)
        self.folder = Path(space.lab.folder) / f"{space.short}-unbound"
        self.folder.mkdir()
        self._write()
        config = _CONFIG.format(folder=self.folder)
        config += "".join(_ZONE.format(name=name, file=self._file(name)) for name in zones)
        (self.folder / "unbound.conf").write_text(config)
        self.process: Process = space.spawn("unbound", "-c", str(self.folder / "unbound.conf"))
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
    """Make a pod's port 53 the service of ADDRESSES."""
    ports, found = [(53, 53)], [(pod.node.name, pod.addresses)]
    objects = []
    for protocol in ("UDP", "TCP"):
        name = f"kube-dns-{protocol.lower()}"
        addresses = list(ADDRESSES.values())
        objects.append(service(name, addresses, ports, protocol, "kube-system"))
        objects += slices(name, ports, found, protocol, "kube-system")
    cluster.apply("kube-dns", *objects)
