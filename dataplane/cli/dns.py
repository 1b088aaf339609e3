"""penstock dns, fqdn: what pods ask for, how long it takes, and where names lead.

Rule: everything is read from shared memory; it works while the agent and the forwarder are down.

Theory. Counters and events are of every pod, with rules or without. `top` answers "who asks what",
`slow` "who waits and for whom"; "why can this pod not reach that name" is answered in name_why.py.
Numbers of endpoints become names by the records of the pods attached here.
"""

from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import ListGroup, config_option, output_option, show
from dataplane.cli.name_why import why

NAME_COLUMNS = ("name", "queries", "answers", "refused", "failures", "missing", "latency_ms")
POD_COLUMNS = (
    "pod", "queries", "retries", "answers", "refused", "missing", "unasked", "malformed",
    "truncated", "p50_ms", "p99_ms", "rcodes",
)  # fmt: skip
SERVER_COLUMNS = ("server", "queries", "retries", "answers", "missing", "p50_ms", "p99_ms",
                  "p99_9_ms", "rcodes")  # fmt: skip
EVENT_COLUMNS = (
    "ago_s", "pod", "kind", "name", "type", "rcode", "latency_ms", "server", "addresses", "flags",
)  # fmt: skip
MAPPING_COLUMNS = ("name", "address", "expires_s", "kept", "for", "patterns")
ORDERS = ("queries", "refused", "failures", "missing", "latency_ms")
ROWS = click.IntRange(1)
OTHERS = "others"  # pods without a row of counters of their own: number 0


def _reader(config: Any) -> Any:
    from dataplane.tables.names_view import NameReader
    from dataplane.tables.shm import Shm

    return NameReader(Shm.open(config.run_dir))


def _pods(config: Any) -> dict[int, str]:
    """Number of an endpoint -> how people call it."""
    from dataplane.cni.endpoints import Endpoints

    if not (config.state_dir / "endpoints").is_dir():
        return {}
    return {
        end.number: f"{end.pod_namespace}/{end.pod_name}" if end.pod_name else end.container_id
        for end in Endpoints(config.state_dir)
    }


def _plain(rows: list[dict[str, Any]], output: str) -> list[dict[str, Any]]:
    """Return rows for people: short numbers, counts as words; a query has no rcode yet."""
    if output == "json":
        return rows
    found = []
    for row in rows:
        one = dict(row)
        if row.get("kind") in ("query", "missing"):
            one["rcode"] = ""
        if row.get("kind") in ("query", "refused"):
            one["latency_ms"] = ""
        row = one.copy()
        for name, cell in row.items():
            if isinstance(cell, float):
                one[name] = f"{cell:.2f}"
            elif isinstance(cell, dict):
                one[name] = " ".join(f"{key}:{count}" for key, count in cell.items())
        found.append(one)
    return found


@click.group()
def dns() -> None:
    """DNS of pods: queries, answers, errors, latency."""


@dns.command()
@click.option("--by", type=click.Choice(["name", "pod", "server"]), default="name")
@click.option("--sort", type=click.Choice(ORDERS), default="queries", show_default=True)
@click.option("-n", "--limit", type=ROWS, default=20, show_default=True, help="Rows shown.")
@config_option
@output_option
def top(config: Any, path: Path | None, by: str, sort: str, limit: int, output: str) -> None:
    """Names, pods or servers with the most queries (or refusals, failures, ...)."""
    reader = _reader(config)
    columns: tuple[str, ...]
    if by == "name":
        rows, columns = reader.names(), NAME_COLUMNS
    elif by == "server":
        rows, columns = reader.servers(), SERVER_COLUMNS
    else:
        names = _pods(config)
        names[0] = OTHERS
        rows = [{"pod": names.get(n, str(n)), **one} for n, one in reader.pods().items()]
        columns = POD_COLUMNS
    for row in rows:
        errors = (count for code, count in row.get("rcodes", {}).items() if code != "NOERROR")
        row.setdefault("failures", sum(errors))
    rows.sort(key=lambda row: -float(row[sort]))
    show(_plain(rows[:limit], output), output, columns)


@dns.command()
@click.option("--over", default=0.0, help="Only answers slower than so many milliseconds.")
@click.option("-n", "--limit", type=ROWS, default=20, show_default=True, help="Events shown.")
@config_option
@output_option
def slow(config: Any, path: Path | None, over: float, limit: int, output: str) -> None:
    """Servers by latency, and the slowest queries lately: answered late, or not at all."""
    reader = _reader(config)
    servers = sorted(reader.servers(), key=lambda row: -float(row["p99_ms"]))
    events = [one for one in _events(config, reader) if one["kind"] in ("answer", "missing")]
    events = [one for one in events if one["latency_ms"] >= over]
    events.sort(key=lambda one: -float(one["latency_ms"]))
    if output == "json":
        show({"servers": servers, "slowest": events[:limit]}, output)
        return
    show(_plain(servers, output), output, SERVER_COLUMNS, "servers")
    show(_plain(events[:limit], output), output, EVENT_COLUMNS, "slowest lately")


@dns.command()
@click.option("-n", "--limit", type=ROWS, default=20, show_default=True, help="The last so many.")
@click.option("--name", default="", help="Only this name.")
@config_option
@output_option
def events(config: Any, path: Path | None, limit: int, name: str, output: str) -> None:
    """Queries, answers, refusals and missing answers as they came."""
    rows = _events(config, _reader(config))
    if name:
        rows = [one for one in rows if one["name"].rstrip(".") == name.lower().rstrip(".")]
    show(_plain(rows[-limit:], output), output, EVENT_COLUMNS)


def _events(config: Any, reader: Any) -> list[dict[str, Any]]:
    import time

    now, names = time.clock_gettime_ns(time.CLOCK_MONOTONIC), _pods(config)
    return [
        {
            **one,
            "ago_s": (now - one["time_ns"]) / 1e9,
            "pod": names.get(one["endpoint"], one["client"]),
        }
        for one in reader.events()[0]
    ]


@click.group(cls=ListGroup)
def fqdn() -> None:
    """DNS names of policies: where they lead, and why not."""


@fqdn.command("list")
@click.option("--all", "everything", is_flag=True, help="Also names that no policy asks for.")
@config_option
@output_option
def list_names(config: Any, path: Path | None, everything: bool, output: str) -> None:
    """Names that lead somewhere: addresses, time left, the patterns that they fit.

    kept: the time is over, and connections still use the address.
    """
    rows = [
        {
            "name": one.name,
            "address": str(one.address),
            "expires_s": round(one.expires_s),
            "kept": one.kept,
            "for": f"identity {one.scope}" if one.scope else "node",
            "patterns": list(one.selectors),
        }
        for one in _reader(config).mappings()
        if everything or one.selectors
    ]
    rows.sort(key=lambda row: (row["name"], row["address"]))
    show(rows, output, MAPPING_COLUMNS)


fqdn.add_command(why)
