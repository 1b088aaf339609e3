"""Requests of the shim, parsed and validated; answers framed for it.

Rule: what leaves parse() is complete and valid for its command; nothing later checks again.

Theory. A request is the CNI_* environment as NUL-terminated NAME=VALUE strings, an empty string,
and the network configuration as the runtime wrote it to the shim's stdin. An answer is one line
"STATUS LENGTH" and LENGTH bytes for stdout. Field rules are those of the CNI specification 1.1.0,
"Parameters" and "Network configuration format"; interface names follow the kernel's
dev_valid_name().
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from dataplane.cni.errors import CniError, Code
from dataplane.cni.portmap import PortMapping, port_mappings

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
NEWEST = VERSIONS[-1]
REQUEST_MAX = 5 << 20  # the shim's limit for stdin, and room for the environment

# The command, the specification version it came in, and the variables it needs.
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ADD": ("0.3.0", ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME")),
    "DEL": ("0.3.0", ("CNI_CONTAINERID", "CNI_IFNAME")),
    "CHECK": ("0.4.0", ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME")),
    "STATUS": ("1.1.0", ()),
    "GC": ("1.1.0", ()),
    "VERSION": ("0.3.0", ()),
}
VALID_ATTACHMENTS = "cni.dev/valid-attachments"
_CONTAINER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_IFNAME = re.compile(r"[^\s/:\0]{1,15}")  # IFNAMSIZ - 1


@dataclass(frozen=True)
class Request:
    """One validated request. Strings that its command does not need may be empty."""

    command: str
    version: str
    network: str = ""
    container_id: str = ""
    netns: str = ""
    ifname: str = ""
    arguments: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    port_mappings: tuple[PortMapping, ...] = ()  # of an ADD

    @property
    def key(self) -> tuple[str, str, str]:
        """The attachment: (network, container id, interface)."""
        return (self.network, self.container_id, self.ifname)

    @property
    def previous(self) -> dict[str, Any] | None:
        """The prevResult of the configuration, if it has one."""
        return self.config.get("prevResult") or None

    @property
    def valid_attachments(self) -> set[tuple[str, str]]:
        """For GC: the (container id, interface) pairs that are still in use."""
        return {(entry["containerID"], entry["ifname"]) for entry in self.config[VALID_ATTACHMENTS]}


def parse(data: bytes) -> Request:
    """Read one framed request. Raises CniError with the specification's code."""
    environment, text = _split(data)
    command = environment.get("CNI_COMMAND", "")
    if command not in COMMANDS:
        raise CniError(
            Code.INVALID_ENVIRONMENT,
            f"CNI_COMMAND={command!r} is unknown; known are {', '.join(COMMANDS)}",
        )
    config = _config(text)
    version = _version(command, config)
    if command == "VERSION":
        return Request(command, version)
    _require(command, environment)
    _check_config(command, config)
    return Request(
        command,
        version,
        network=config["name"],
        container_id=environment.get("CNI_CONTAINERID", ""),
        netns=environment.get("CNI_NETNS", ""),
        ifname=environment.get("CNI_IFNAME", ""),
        arguments=_arguments(environment.get("CNI_ARGS", "")),
        config=config,
        port_mappings=port_mappings(config) if command == "ADD" else (),
    )


def version_of(data: bytes) -> str:
    """The cniVersion to answer a request with that parse() refused."""
    try:
        version = _config(_split(data)[1]).get("cniVersion")
    except CniError:
        return NEWEST
    return version if version in VERSIONS else NEWEST


def frame(status: int, body: dict[str, Any] | None) -> bytes:
    """An answer: exit status and what the shim prints."""
    text = b"" if body is None else json.dumps(body).encode() + b"\n"
    return b"%d %d\n%s" % (status, len(text), text)


def error_body(version: str, error: CniError) -> dict[str, Any]:
    """The error structure of the specification, "Error"."""
    body = {"cniVersion": version, "code": int(error.code), "msg": str(error)}
    return body | {"details": error.details} if error.details else body


def _split(data: bytes) -> tuple[dict[str, str], bytes]:
    # An environment without variables is the empty string alone, and has no command anyway.
    head, separator, text = data.partition(b"\0\0")
    if not separator:
        raise CniError(Code.IO_FAILURE, f"the request of {len(data)} bytes was cut off")
    try:
        pairs = [part.decode().partition("=") for part in head.split(b"\0")]
    except UnicodeDecodeError as error:
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_* is not UTF-8: {error}") from None
    return {name: value for name, _, value in pairs}, text


def _config(text: bytes) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"the network configuration on stdin is not JSON: {error}"
        raise CniError(Code.DECODE_FAILURE, message) from None
    if not isinstance(config, dict):
        kind = type(config).__name__
        message = f"the network configuration on stdin is a {kind}, not an object"
        raise CniError(Code.DECODE_FAILURE, message)
    return config


def _version(command: str, config: dict[str, Any]) -> str:
    version = config.get("cniVersion", "0.1.0")  # what the specification assumes without the key
    supported = ", ".join(VERSIONS)
    if command == "VERSION":
        return version if version in VERSIONS else NEWEST
    if version not in VERSIONS:
        message = f"cniVersion {version!r} is not supported; supported are {supported}"
        raise CniError(Code.INCOMPATIBLE_VERSION, message)
    since = COMMANDS[command][0]
    if VERSIONS.index(version) < VERSIONS.index(since):
        message = f"{command} came with version {since}; the configuration says {version}"
        raise CniError(Code.INCOMPATIBLE_VERSION, message)
    return version


def _require(command: str, environment: dict[str, str]) -> None:
    missing = [name for name in COMMANDS[command][1] if not environment.get(name)]
    if missing:
        message = f"{command} needs {', '.join(missing)} in its environment"
        raise CniError(Code.INVALID_ENVIRONMENT, message)
    container = environment.get("CNI_CONTAINERID", "")
    if container and not _CONTAINER_ID.fullmatch(container):
        raise CniError(
            Code.INVALID_ENVIRONMENT,
            f"CNI_CONTAINERID={container!r} must start with a letter or digit and go on with "
            "letters, digits, '_', '.', '-'",
        )
    ifname = environment.get("CNI_IFNAME", "")
    if ifname and (not _IFNAME.fullmatch(ifname) or ifname in (".", "..")):
        raise CniError(
            Code.INVALID_ENVIRONMENT,
            f"CNI_IFNAME={ifname!r} is not a Linux interface name: 1 to 15 characters without "
            "'/', ':' and white space",
        )


def _check_config(command: str, config: dict[str, Any]) -> None:
    name = config.get("name")
    if not isinstance(name, str) or not _CONTAINER_ID.fullmatch(name):
        message = f'"name" is {name!r}; a network name starts with a letter or digit'
        raise CniError(Code.INVALID_CONFIG, message)
    for key in ("ipam", "ipMasq"):
        if config.get(key):
            raise CniError(
                Code.UNSUPPORTED_FIELD,
                f'"{key}": {json.dumps(config[key])} is not supported: addresses come from the '
                "agent and pods are routed, not masqueraded; remove the key",
            )
    previous = config.get("prevResult") or {}
    if not isinstance(previous, dict):
        raise CniError(Code.INVALID_CONFIG, f'"prevResult" is {previous!r}, not an object')
    for key in ("interfaces", "ips", "routes"):
        entries = previous.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            message = f'"prevResult" has "{key}": {entries!r}, not a list of objects'
            raise CniError(Code.INVALID_CONFIG, message)
    if command == "CHECK" and not previous:
        raise CniError(Code.INVALID_CONFIG, 'CHECK needs "prevResult", the result of the ADD')
    if command == "GC":
        _check_attachments(config)


def _check_attachments(config: dict[str, Any]) -> None:
    # A GC without the list would take every pod's network away.
    entries = config.get(VALID_ATTACHMENTS)
    if not isinstance(entries, list):
        message = f'GC needs "{VALID_ATTACHMENTS}", a list (empty: none is valid)'
        raise CniError(Code.INVALID_CONFIG, message)
    for entry in entries:
        fields = [entry.get(k) if isinstance(entry, dict) else None for k in _ATTACHMENT]
        if not all(isinstance(value, str) for value in fields):
            message = f'"{VALID_ATTACHMENTS}" has {entry!r} without strings {_ATTACHMENT}'
            raise CniError(Code.INVALID_CONFIG, message)


_ATTACHMENT = ("containerID", "ifname")


def _arguments(text: str) -> dict[str, str]:
    """CNI_ARGS, "K=V;K=V". Unknown keys are kept: what to ignore is the reader's choice."""
    pairs = [part.partition("=") for part in text.split(";") if part]
    wrong = [key for key, equals, _ in pairs if not equals or not key]
    if wrong:
        message = f"CNI_ARGS={text!r} has {wrong[0]!r} where KEY=VALUE is expected"
        raise CniError(Code.INVALID_ENVIRONMENT, message)
    return {key: value for key, _, value in pairs}
