"""Services at scale: 10 000 services with 100 000 endpoints. `python -m bench.scale_services`.

Rule: what is timed is what the agent does: objects in, tables in shared memory out.

Theory. The world is made as objects, since reading manifests is the source's part. Measured are:
all from nothing; taking over what stands, as after a restart; an update in which nothing changed;
one endpoint more, one service more, one endpoint that is no longer ready, each until it stands in
the tables; and a storm of changes, one an update and gathered as the agent gathers them. After
each part the tables are compared with what a fresh engine writes into empty ones, by following the
pointers as the kernel does. Memory is that of the files and of this process.
"""

import argparse
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from dataplane.objects.collect import Objects
from dataplane.objects.core import Node
from dataplane.objects.services import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Service,
    ServicePort,
)
from dataplane.services.engine import ServiceEngine
from dataplane.services.model import ServiceOptions
from dataplane.tables.service_view import decoded
from dataplane.tables.services import ServiceWriter
from dataplane.tables.shm import Shm

NODES = 1000
NODE = "node1"
BACKENDS4, BACKENDS6 = int(IPv4Address("10.128.0.0")), int(IPv6Address("fd00:244::"))


def _endpoint(number: int, family: int) -> Endpoint:
    address = IPv4Address(BACKENDS4 + number) if family == 4 else IPv6Address(BACKENDS6 + number)
    return Endpoint(address, node=f"node{number % NODES}", pod=f"pod-{number}")


def world(services: int, endpoints: int, families: tuple[int, ...], external: int) -> Objects:
    """Make the objects; every `external`-th service is a LoadBalancer with a NodePort, 0: none."""
    each = endpoints // services
    made: dict[tuple[str, str], Service] = {}
    slices: dict[tuple[str, str], EndpointSlice] = {}
    for n in range(services):
        name = f"svc-{n}"
        outside = bool(external) and n % external == 0
        vips = (IPv4Address("10.96.0.0") + 2 + n, IPv6Address("fd00:96::") + 2 + n)
        made["default", name] = Service(
            "default",
            name,
            "LoadBalancer" if outside else "ClusterIP",
            tuple(vip for vip in vips if vip.version in families),
            ports=(ServicePort("http", "TCP", 80, 8080, 30000 + n // external if outside else 0),),
            load_balancer_ips=(IPv4Address("198.18.0.0") + n,) if outside and 4 in families else (),
        )
        for family in families:
            slices["default", f"{name}-v{family}"] = EndpointSlice(
                "default",
                f"{name}-v{family}",
                name,
                family,
                tuple(_endpoint(n * each + k + 1, family) for k in range(each)),
                (EndpointPort("http", "TCP", 8080),),
            )
    here = Node(NODE, (ip_address("192.0.2.1"), ip_address("2001:db8::1")))
    return Objects(nodes={NODE: here}, services=made, slices=slices)


class Bench:
    """An engine over tables of its own."""

    def __init__(self, folder: Path, options: ServiceOptions) -> None:
        """Make the tables in `folder`."""
        self.folder, self.options = folder, options
        self.shm = Shm.create(folder)
        self.start()

    def start(self) -> float:
        """Start writer and engine over what stands; return the seconds."""
        began = time.perf_counter()
        writer = ServiceWriter(self.shm)
        self.engine = ServiceEngine(writer, self.options, self.folder / "services.json")
        return time.perf_counter() - began

    def update(self, objects: Objects) -> float:
        """Bring objects in force; return the seconds. Raises RuntimeError for a problem."""
        began = time.perf_counter()
        problems = self.engine.update(objects, NODE, (), ())
        took = time.perf_counter() - began
        if problems:
            raise RuntimeError(f"{len(problems)} problems: {problems[0]}")
        return took


def one_more_endpoint(objects: Objects, n: int) -> Objects:
    """Add an endpoint to a service."""
    key = ("default", f"svc-{n}-v4")
    one = objects.slices[key]
    more = (*one.endpoints, _endpoint(5_000_000 + n, 4))
    return replace(objects, slices={**objects.slices, key: replace(one, endpoints=more)})


def not_ready(objects: Objects, n: int) -> Objects:
    """Make the first endpoint of a service not ready."""
    key = ("default", f"svc-{n}-v4")
    one = objects.slices[key]
    first = replace(one.endpoints[0], ready=not one.endpoints[0].ready)
    ends = (first, *one.endpoints[1:])
    return replace(objects, slices={**objects.slices, key: replace(one, endpoints=ends)})


def one_more_service(objects: Objects, n: int) -> Objects:
    """Add a service with the endpoints of another."""
    key = ("default", f"more-{n}")
    one = objects.services["default", f"svc-{n}"]
    vip = (IPv4Address("10.111.0.0") + n,)
    fresh = replace(one, name=key[1], type="ClusterIP", cluster_ips=vip, load_balancer_ips=())
    part = replace(objects.slices["default", f"svc-{n}-v4"], name=f"more-{n}", service=key[1])
    return replace(
        objects,
        services={**objects.services, key: fresh},
        slices={**objects.slices, key: part},
    )


def _repeat(
    bench: Bench, objects: Objects, change: Callable[[Objects, int], Objects], services: int
) -> tuple[Objects, list[float]]:
    rng = random.Random(7)
    took = []
    for n in rng.sample(range(services), 50):
        objects = change(objects, n)
        took.append(bench.update(objects))
    return objects, took


def _storm(bench: Bench, objects: Objects, services: int, gathered: int) -> tuple[Objects, float]:
    """Make 1000 changes, `gathered` of them an update; return the seconds of all updates."""
    rng = random.Random(11)
    total = 0.0
    for _ in range(1000 // gathered):
        for _ in range(gathered):
            objects = not_ready(objects, rng.randrange(services))
        total += bench.update(objects)
    return objects, total


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all parts; return the numbers."""
    settings = ServiceOptions(algorithm=options.algorithm, maglev_size=options.maglev_size)
    families = (4, 6) if options.dual else (4,)
    objects = world(options.services, options.endpoints, families, options.external)
    bench = Bench(folder / "run", settings)
    found: dict[str, Any] = {"from nothing": bench.update(objects)}
    found["take over"] = bench.start() + bench.update(objects)
    found["nothing changed"] = bench.update(objects)
    for what, change in (
        ("one endpoint more", one_more_endpoint),
        ("one endpoint not ready", not_ready),
        ("one service more", one_more_service),
    ):
        objects, took = _repeat(bench, objects, change, options.services)
        found[what] = statistics.median(took)
        found[f"{what}, the worst of 50"] = max(took)
    objects, found["1000 changes, one an update"] = _storm(bench, objects, options.services, 1)
    objects, found["1000 changes, 20 an update"] = _storm(bench, objects, options.services, 20)
    fresh = Bench(folder / "fresh", settings)
    fresh.update(objects)
    if decoded(bench.shm) != decoded(fresh.shm):
        raise RuntimeError("the tables differ from those that a fresh engine writes")
    names = ("frontends", "services", "backends", "backend_lists", "maglev")
    size = sum((bench.shm.folder / name).stat().st_blocks for name in names) * 512
    return {
        "seconds": found,
        "tables_bytes": size,
        "process_bytes_most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "usage": bench.engine.usage(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; --json FILE keeps the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--services", type=int, default=10_000)
    parser.add_argument("--endpoints", type=int, default=100_000)
    parser.add_argument("--dual", action="store_true", help="both families: twice the endpoints")
    parser.add_argument("--external", type=int, default=5, help="every n-th is a LoadBalancer")
    parser.add_argument("--algorithm", choices=("random", "maglev"), default="random")
    parser.add_argument("--maglev-size", type=int, default=16381)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="penstock-services-") as folder:
        found = measure(options, Path(folder))
    _print(found)
    if options.json:
        given = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({"options": given, **found}, indent=1))
    return 0


def _print(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="services in force", title_justify="left")
    table.add_column("what")
    table.add_column("ms", justify="right")
    for what, seconds in found["seconds"].items():
        table.add_row(what, f"{seconds * 1e3:,.1f}")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    for name, (used, limit) in found["usage"].items():
        console.print(f"{name:<14} {used:>12,} of {limit:,}", highlight=False)
    for name in ("tables_bytes", "process_bytes_most"):
        console.print(f"{name:<20} {found[name] / 2**20:,.0f} MiB", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
