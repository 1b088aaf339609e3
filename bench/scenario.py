"""Scenarios: files that say what is measured, checked, and taken apart into cases.

Rule: a file that does not fit is refused whole, with file, line, option and what would be right.

Theory. A scenario names a topology, what is switched on, the traffic and the measurements. Where an
option holds a list, each of its values is a case. Cases that share a *place* (topology and
features) share one set of subjects: these are built once, and every turn measures every case with
every subject. `csit` is the name that FD.io's CSIT uses for the case, where it has one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bench.lab import LabError
from bench.traffic import FLOWS_MOST, NAT_BITS, PORTS_MOST, SOURCE_BITS, Traffic

FOLDER = Path(__file__).parent / "scenarios"
Topology = Literal["same", "vxlan", "direct", "outside"]
Measure = Literal[
    "most", "search", "loss", "latency", "burst", "stream", "rr", "crr", "dns",
]  # fmt: skip
FRAMES: frozenset[Measure] = frozenset({"most", "search", "loss", "latency", "burst"})
"""Measurements that frames make; the others are programs in the pods."""
WORDS = {
    "most": "packets",
    "search": "throughput",
    "loss": "loss curve",
    "latency": "latency of packets",
    "burst": "back to back",
    "stream": "one TCP stream",
    "rr": "request, response",
    "crr": "connect, request, response, close",
    "dns": "DNS",
}
TOPOLOGIES = {
    "same": "same node",
    "vxlan": "across, VXLAN",
    "direct": "across, direct",
    "outside": "to the world",
}
Rules = Annotated[int, Field(ge=0, le=200_000)]
Flows = Annotated[int, Field(ge=1, le=FLOWS_MOST)]
Size = Literal["imix", "jumbo"] | Annotated[int, Field(ge=64, le=9018)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Features(_Section):
    """What is switched on beside plain forwarding."""

    policy: Rules | list[Rules] = Field(
        0, description="rules over the server pod (outside: what the client pod may send), 0: none"
    )
    services: Rules | list[Rules] = Field(
        0, description="services; the client speaks to the last one's address, 0: to the pod"
    )
    masquerade: bool = Field(False, description="topology outside: the world sees the node")
    pods: Annotated[int, Field(ge=0, le=200)] | list[int] = Field(
        0, description="further pods on the client's node, idle"
    )


class TrafficSection(_Section):
    """What is sent."""

    size: Size | list[Size] = Field(64, description='bytes with FCS, "imix" or "jumbo"')
    flows: Flows | list[Flows] = Field(1, description="from one pod to one address")
    order: Literal["uniform", "zipf"] = Field("uniform", description="which flow is next")
    skew: float = Field(1.0, gt=0, le=3, description="exponent of Zipf's distribution")
    directions: Literal[1, 2] = Field(1, description="2: every packet is answered by one")
    established: bool = Field(True, description="every flow has been answered once before")
    connections: Annotated[int, Field(ge=1, le=1024)] | list[int] = Field(
        1, description="of requests at a time"
    )
    rate: float = Field(0, ge=0, description="requests a second at fixed times; 0: one by one")


class Scenario(_Section):
    """A file."""

    name: str = ""
    title: str = Field(description="a line for people")
    csit: str = Field("", description="CSIT's name of the case")
    topology: Topology
    family: Literal[4, 6] | list[Literal[4, 6]] = Field(4, description="of the pods' addresses")
    mtu: Annotated[int, Field(ge=1280, le=9216)] = Field(1500, description="of the underlay")
    features: Features = Field(default_factory=Features)
    traffic: TrafficSection = Field(default_factory=TrafficSection)
    measure: list[Measure] = Field(min_length=1, description="what is measured")
    subjects: list[str] = Field(default_factory=list, description="only these, by name")
    quick: bool = Field(False, description="part of `make bench-quick`")
    curve: Literal["", "flows", "policy", "services", "pods"] = Field(
        "", description="the option that a plot has on its axis"
    )

    @model_validator(mode="after")
    def _check(self) -> "Scenario":
        features, flows = self.features, max(_many(self.traffic.flows))
        if features.masquerade and self.topology != "outside":
            raise ValueError("features.masquerade: only with topology: outside")
        if features.masquerade and flows > PORTS_MOST << NAT_BITS:
            raise ValueError(f"masqueraded: at most {PORTS_MOST << NAT_BITS} flows")
        if self.topology == "outside" and _any(features.services):
            raise ValueError("topology outside has a host at its end: no services")
        if self.traffic.rate and not set(self.measure) & {"rr", "crr"}:
            raise ValueError("traffic.rate: only with measure: rr or crr")
        if self.traffic.order == "zipf" and flows < 2:
            raise ValueError("traffic.order zipf: needs flows")
        if self.curve and len(_many(self._axis())) < 2:
            raise ValueError(f"curve {self.curve}: needs a list there")
        return self

    def _axis(self) -> int | list[int]:
        if self.curve == "flows":
            return self.traffic.flows
        return getattr(self.features, self.curve)


def _many(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _any(given: int | list[int]) -> bool:
    return any(_many(given))


@dataclass(frozen=True)
class Place:
    """What subjects are built for."""

    topology: Topology
    family: int
    mtu: int = 1500
    policy: int = 0
    services: int = 0
    masquerade: bool = False
    pods: int = 0
    frames: bool = False  # pods send and receive by XDP programs, not by sockets

    @property
    def plain(self) -> bool:
        """Whether nothing is asked for beside forwarding."""
        return not (self.policy or self.services or self.masquerade)

    def __str__(self) -> str:
        words = [TOPOLOGIES[self.topology], f"IPv{self.family}"]
        words += [f"MTU {self.mtu}"] * (self.mtu != 1500)
        words += [f"{self.policy:,} rule{'s' * (self.policy > 1)}"] * bool(self.policy)
        words += [f"{self.services:,} service{'s' * (self.services > 1)}"] * bool(self.services)
        words += ["masquerade"] * self.masquerade
        words += [f"{self.pods} further pods"] * bool(self.pods)
        return ", ".join(words)


@dataclass(frozen=True)
class Case:
    """One measurement of one kind of traffic at one place."""

    scenario: str
    place: Place
    measure: Measure
    traffic: Traffic
    directions: int = 1
    established: bool = True
    connections: int = 1
    rate: float = 0

    @property
    def label(self) -> str:
        """What the tables and results call it, within its scenario."""
        if self.measure in FRAMES:
            size = self.traffic.size
            words = [f"{size} B" if isinstance(size, int) else str(size)]
            words.append(f"{self.traffic.flows:,} flow{'s' * (self.traffic.flows > 1)}")
            words += [f"Zipf {self.traffic.skew:g}"] * (self.traffic.order == "zipf")
            words += ["both directions"] * (self.directions == 2)
            words += ["not answered"] * (not self.established)
        else:
            words = [f"{self.connections} at a time"] * (self.connections > 1)
            words += [f"{self.rate:,.0f} a second"] * bool(self.rate)
        return ": ".join([WORDS[self.measure], ", ".join(words)]).removesuffix(": ")


def cases(scenario: Scenario, quick: bool = False) -> list[Case]:
    """Return every case of a scenario: the product of its lists; quick: their last values only."""
    many = (lambda given: _many(given)[-1:]) if quick else _many
    features, traffic = scenario.features, scenario.traffic
    places = [
        Place(scenario.topology, family, scenario.mtu, rules, services, features.masquerade, pods)
        for family, rules, services, pods in product(
            *map(many, (scenario.family, features.policy, features.services, features.pods))
        )
    ]
    found: dict[Case, None] = {}
    for place, measure, size, flows, connections in product(
        places, scenario.measure, *map(many, (traffic.size, traffic.flows, traffic.connections))
    ):
        frames = measure in FRAMES
        place = replace(place, frames=frames)
        bits = NAT_BITS if place.masquerade else SOURCE_BITS
        sent = Traffic(size, flows, traffic.order, traffic.skew, source_bits=bits)
        case = Case(
            scenario.name,
            place,
            measure,
            sent if frames else Traffic(),
            traffic.directions if frames else 1,
            traffic.established or not frames,
            1 if frames else connections,
            0 if frames else traffic.rate,
        )
        found[case] = None
    return list(found)


class ScenarioError(LabError):
    """A file cannot be used; the message has file, line, option."""


def load(path: Path) -> Scenario:
    """Read and check a file. Raises ScenarioError."""
    try:
        text = path.read_text()
        raw = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ScenarioError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ScenarioError(f"{path}: must be a mapping of options")
    try:
        return Scenario.model_validate({"name": path.stem, **raw})
    except ValidationError as error:
        lines = [_explain(path, root, item) for item in error.errors()]
        raise ScenarioError("; ".join(dict.fromkeys(lines))) from error


def _explain(path: Path, root: Any, item: Any) -> str:
    where = [str(part) for part in item["loc"] if not str(part).startswith(("list[", "literal["))]
    place = ".".join(where) or "file"
    return f"{path}:{_line(root, item['loc'])}: {place}: {item['msg']}"


def _line(node: Any, place: Iterable[int | str]) -> int:
    """Return the line of an option, or of what should hold it; the first is 1."""
    line = 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def load_all(folder: Path = FOLDER) -> dict[str, Scenario]:
    """Return every scenario of a folder by name. Raises ScenarioError."""
    return {path.stem: load(path) for path in sorted(folder.glob("*.yaml"))}


def choose(names: Iterable[str], quick: bool, folder: Path = FOLDER) -> list[Scenario]:
    """Return scenarios by name or path; none: all, or the quick ones. Raises ScenarioError."""
    known = load_all(folder)
    chosen = []
    for name in names:
        if "/" in name or name.endswith(".yaml"):
            chosen.append(load(Path(name)))
        elif name in known:
            chosen.append(known[name])
        else:
            raise ScenarioError(f"no scenario {name}; there are: {', '.join(known)}")
    return chosen or [one for one in known.values() if one.quick or not quick]
