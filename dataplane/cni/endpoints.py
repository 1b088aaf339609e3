"""What stands of each pod's attachment, kept on disk.

Rule: a record is on disk before the pod's ADD is answered, and off it before its DEL is.

Theory. One JSON file an endpoint, named after the host end of its veth pair, written beside and
renamed with both file and folder synced, so that a crash leaves the old or the new record. The
number is small, stable and unique: counters and flows refer to it. Readers get frozen records;
listeners learn of every change.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from dataplane.cni.portmap import PortMapping

Key = tuple[str, str, str]  # network, container id, interface


@dataclass(frozen=True)
class Endpoint:
    """One attachment of a pod to the node. MACs are "0a:..", the MTU is in bytes."""

    number: int
    network: str
    container_id: str
    ifname: str
    netns: str
    host_ifname: str
    host_ifindex: int
    mac: str
    host_mac: str
    mtu: int
    queue_count: int
    address4: IPv4Address | None = None
    address6: IPv6Address | None = None
    pod_namespace: str = ""
    pod_name: str = ""
    pod_uid: str = ""
    port_mappings: tuple[PortMapping, ...] = ()
    hook: str = "xdp"  # Attachment's

    @property
    def key(self) -> Key:
        """The attachment: (network, container id, interface)."""
        return (self.network, self.container_id, self.ifname)

    def to_json(self) -> str:
        """The record as a JSON object."""
        plain = {one.name: _plain(getattr(self, one.name)) for one in fields(self)}
        return json.dumps(plain, indent=1)

    @staticmethod
    def from_json(text: str) -> "Endpoint":
        """The inverse of to_json(). Raises ValueError for anything else."""
        try:
            values = json.loads(text)
            known = {f.name for f in fields(Endpoint)}
            values = {name: value for name, value in values.items() if name in known}
            for name, kind in (("address4", IPv4Address), ("address6", IPv6Address)):
                values[name] = kind(values[name]) if values.get(name) else None
            mappings = values.get("port_mappings") or ()
            values["port_mappings"] = tuple(PortMapping.read(entry) for entry in mappings)
            if not isinstance(values.get("number"), int):
                raise ValueError(f"number is {values.get('number')!r}")
            return Endpoint(**values)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not an endpoint: {error}") from None


class Endpoints:
    """All endpoints of this node, by key, with their files."""

    def __init__(self, state_dir: Path) -> None:
        """Load what stands in state_dir/endpoints. Unreadable files are listed in `broken`."""
        self.folder = Path(state_dir) / "endpoints"
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.broken: dict[str, str] = {}  # host end -> what is wrong with its file
        self._by_key: dict[Key, Endpoint] = {}
        self._listeners: list[Callable[[], None]] = []
        for path in sorted(self.folder.iterdir()):
            if path.name.startswith("."):
                path.unlink()  # a write that a crash interrupted
            elif path.suffix == ".json":
                self._load(path)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call listener() after every change."""
        self._listeners.append(listener)

    def __iter__(self) -> Iterator[Endpoint]:
        """Endpoints in the order of their numbers."""
        return iter(sorted(self._by_key.values(), key=lambda endpoint: endpoint.number))

    def __len__(self) -> int:
        """How many there are."""
        return len(self._by_key)

    def get(self, key: Key) -> Endpoint | None:
        """The endpoint of an attachment."""
        return self._by_key.get(key)

    def next_number(self) -> int:
        """The smallest number from 1 that no endpoint has."""
        taken = {endpoint.number for endpoint in self}
        return next(n for n in range(1, len(taken) + 2) if n not in taken)

    def save(self, endpoint: Endpoint) -> None:
        """Add or replace a record. Raises OSError when the disk refuses, changing nothing."""
        final = self.folder / f"{endpoint.host_ifname}.json"
        temporary = self.folder / f".{endpoint.host_ifname}"
        try:
            with temporary.open("w") as file:
                file.write(endpoint.to_json())
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(final)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._sync()
        self._by_key[endpoint.key] = endpoint
        self._changed()

    def delete(self, key: Key) -> Endpoint | None:
        """Remove a record; None when there is none. Raises OSError."""
        endpoint = self._by_key.get(key)
        if endpoint is not None:
            (self.folder / f"{endpoint.host_ifname}.json").unlink(missing_ok=True)
            self._sync()
            del self._by_key[key]
            self._changed()
        return endpoint

    def forget_broken(self, host_ifname: str) -> None:
        """Remove a file that could not be read, once its pair is gone. Raises OSError."""
        if self.broken.pop(host_ifname, None) is not None:
            (self.folder / f"{host_ifname}.json").unlink(missing_ok=True)
            self._sync()

    def _load(self, path: Path) -> None:
        try:
            endpoint = Endpoint.from_json(path.read_text())
        except (OSError, ValueError) as error:
            self.broken[path.stem] = f"{path}: {error}"
        else:
            self._by_key[endpoint.key] = endpoint

    def _sync(self) -> None:
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [mapping.plain() for mapping in value]
    return str(value) if isinstance(value, IPv4Address | IPv6Address) else value
