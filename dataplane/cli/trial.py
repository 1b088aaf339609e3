"""penstock policy try.

Rule: reads manifests, endpoint records and recorded flows; changes nothing, asks no daemon.

Theory. The manifests are judged twice over the same flows, as they are and with FILE, by the
kernels that enforce (engine/trial.py), in scratch tables that are gone afterwards. Flows come from
the observer's history, which is at most a minute behind.
"""

import dataclasses
import sys
import tempfile
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import config_option, output_option, show

TMPFS = Path("/dev/shm")
SHOWN = 50  # lines, those with most flows first
COLUMNS = ("was", "becomes", "source", "destination", "protocol", "port", "flows", "by")


@click.command("try")
@click.argument(
    "file", type=click.Path(path_type=Path, dir_okay=False, exists=True), required=False
)
@click.option("--without", multiple=True, help="NAMESPACE/NAME of policies to take away.")
@click.option("--input", "flows", type=click.Path(path_type=Path),
              help="Recorded flows: a Parquet file or folder  [default: this node's].")  # fmt: skip
@click.option("--since", help="Only flows since then: 1h, or a time.")
@config_option
@output_option
def try_(
    config: Any, path: Path | None, file: Path | None, without: tuple[str, ...],
    flows: Path | None, since: str | None, output: str,
) -> None:  # fmt: skip
    """Which recorded flows a policy would change, before it is applied.

    FILE has NetworkPolicies, CiliumNetworkPolicies, CiliumClusterwideNetworkPolicies; one with the
    name of a policy that is there takes its place. Exit status 1: flows would be denied.

    Example: penstock policy try allow-web.yaml --since 1h
    """
    from dataplane.observe.history import FOLDER, files, overlapping
    from dataplane.observe.moments import moment

    if file is None and not without:
        raise click.UsageError("nothing to try: give FILE, or --without NAMESPACE/NAME")
    since_ns = int(moment(since).timestamp() * 1e9) if since else 0
    paths = overlapping(files(flows or config.state_dir / FOLDER), since_ns)
    objects = _objects(config)
    proposed = _proposed(objects, file, without)
    place = TMPFS if TMPFS.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="penstock-try-", dir=place) as scratch:
        found = _try(config, Path(scratch), objects, proposed, paths, since_ns)
    _print(found, output)
    sys.exit(1 if any(row["becomes"] == "denied" for row in found.rows()) else 0)


def _objects(config: Any) -> Any:
    from dataplane.control.folder import FolderSource

    source = FolderSource(config.source.folder)
    objects = source.read()
    for where, why in source.errors.items():
        click.echo(f"{where}: {why}", err=True)
    return objects


def _proposed(objects: Any, file: Path | None, without: tuple[str, ...]) -> Any:
    """Return the objects with the policies of a file, and without some."""
    import yaml

    from dataplane.objects.collect import interpret

    policies = dict(objects.policies)
    for name in without:
        space, _, bare = name.rpartition("/")
        keys = [key for key in policies if key[1:] == (space, bare)]
        if not keys:
            raise ValueError(f"--without {name}: no such policy among the manifests")
        for key in keys:
            del policies[key]
    if file is not None:
        try:
            documents = list(yaml.safe_load_all(file.read_text()))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
        manifests = [one for document in documents for one in _items(document)]
        if not manifests:
            raise ValueError(f"{file} has no policy in it: nothing to try")
        for manifest in manifests:
            where, key, policy = interpret(manifest)
            if where != "policies":
                raise ValueError(
                    f"{file}: {manifest.get('kind')} is no policy: only these are tried"
                )
            policies[key] = policy
    return dataclasses.replace(objects, policies=policies, since=None)


def _items(document: Any) -> list[Any]:
    if document is None:
        return []
    if isinstance(document, dict) and str(document.get("kind", "")).endswith("List"):
        return list(document.get("items") or [])
    return [document]


def _local(config: Any, objects: Any) -> Any:
    """This node as policies see it, from its endpoint records; ports are numbers of our own."""
    from dataplane.cni.endpoints import Endpoints
    from dataplane.policy.options import LocalEndpoint, LocalView

    ends = list(Endpoints(config.state_dir)) if (config.state_dir / "endpoints").is_dir() else []
    local = tuple(
        LocalEndpoint(
            number,
            end.pod_namespace,
            end.pod_name,
            tuple(at for at in (end.address4, end.address6) if at is not None),
        )
        for number, end in enumerate(ends, 1)
    )
    node = objects.nodes.get(config.node.name)
    own: set[IPv4Address | IPv6Address] = set()
    if node is not None:  # its InternalIPs, and the gateways of its pods
        own |= set(node.internal_ips) | {cidr[1] for cidr in node.pod_cidrs}
    return LocalView(config.node.name, frozenset(own), local, tuple(config.network.clusters))


def _try(
    config: Any, scratch: Path, objects: Any, proposed: Any, paths: list[Path], since_ns: int
) -> Any:
    from dataplane.engine.trial import COLUMNS as ASKED
    from dataplane.engine.trial import Trial
    from dataplane.observe.changes import Changes, judged_flows, still_there
    from dataplane.observe.directory import Directory, End
    from dataplane.observe.history import Past
    from dataplane.policy.options import PolicyOptions
    from dataplane.tables.shm import LAYOUT, Shm
    from xdp.abi import CONST

    options = config.policy
    policy = PolicyOptions(
        options.enforcement, options.cidr_match, options.audit, options.deny_response,
        options.entries_max,
    )  # fmt: skip
    flags = CONST["NODE_POLICY_HAIRPIN"] if options.hairpin == "enforce" else 0
    local = _local(config, objects)
    node = Shm.open(config.run_dir) if (config.run_dir / "shm" / LAYOUT).exists() else None
    holders = Directory()
    for end in local.endpoints:
        for at in end.addresses:
            key = at.version, int(at) >> 64, int(at) & ((1 << 64) - 1)
            holders.hold(key, End(end.namespace, end.pod), 0)
    trials = [
        Trial(scratch / name, some, local, policy, flags, node)
        for name, some in (("now", objects), ("then", proposed))
    ]
    for problem in trials[1].problems:
        click.echo(problem, err=True)
    changes = Changes()
    for path in paths:
        past = Past(path)
        asked = judged_flows(past.flows)
        flows = past.flows.take(asked[past.flows.wall_ns[asked] >= since_ns])
        good = still_there(flows, past.directory, holders)
        changes.gone += int((~good).sum())
        flows = flows.take(good.nonzero()[0])
        columns = {name: getattr(flows, name) for name in ASKED}
        before, after = (trial.judge(columns) for trial in trials)
        known = [trial.names(one.words) for trial, one in zip(trials, (before, after), strict=True)]
        changes.add(
            flows, past.directory, (before.reasons, before.words), (after.reasons, after.words),
            (lambda word: known[0].get(word, ""), lambda word: known[1].get(word, "")),  # noqa: B023
        )  # fmt: skip
    for trial in trials:
        trial.close()
    return changes


def _print(found: Any, output: str) -> None:
    rows = found.rows()
    if output == "json":
        counts = {name: getattr(found, name) for name in ("judged", "changed", "gone", "otherwise")}
        show({**counts, "changes": rows}, output)
        return
    if rows:
        show(rows[:SHOWN], output, COLUMNS)
    if len(rows) > SHOWN:
        click.echo(f"and {len(rows) - SHOWN:,} more lines: -o json has them all")
    click.echo(f"{found.judged:,} flows judged, {found.changed:,} would change")
    if found.gone:
        click.echo(f"{found.gone:,} flows not judged: their pods are gone", err=True)
    if found.otherwise:
        click.echo(f"{found.otherwise:,} flows were recorded under other policies", err=True)
