"""penstock policy, identity, ip: who is who, who may talk to whom, and why.

Rule: what is in force is read from shared memory, without the agent; `why` and `lint` judge
manifests, with or without a node.

Theory. `policy get`, `identity`, `ip` decode the tables. `why` asks the agent, because it knows the
endpoints of this node; when it is away, or with --manifests, the manifests are read here. Where one
of the ends is a pod of this node, `why` also says what the tables say, so that a difference shows.
"""

import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import ListGroup, ask, config_option, output_option, show
from dataplane.cli.trial import try_

ENTRY_COLUMNS = (
    "direction",
    "peers",
    "protocol",
    "ports",
    "name",
    "action",
    "answer",
    "by",
    "group",
)
ADDRESS_COLUMNS = ("prefix", "identity", "labels", "group", "flags")
FINDING_COLUMNS = ("severity", "code", "policy", "rule", "text")
DENIED = 1


def _view(config: Any) -> Any:
    from dataplane.daemon.engines import RULES
    from dataplane.policy.view import View
    from dataplane.tables.shm import Shm

    shm = Shm.open(config.run_dir)
    return View(shm, shm.folder / RULES)


def _endpoints(config: Any) -> list[Any]:
    """Pods attached to this node, from their records."""
    from dataplane.cni.endpoints import Endpoints

    if not (config.state_dir / "endpoints").is_dir():
        return []
    return list(Endpoints(config.state_dir))


def _table(rows: list[dict[str, Any]], output: str, columns: tuple[str, ...]) -> None:
    """Print rows; for people, numbers that are names have no commas."""
    if output != "json":
        named = ("identity", "group", "port")
        rows = [{k: str(v) if k in named else v for k, v in row.items()} for row in rows]
    show(rows, output, columns)


def _ports(shm: Any) -> dict[str, int]:
    """Address of a pod of this node -> its port."""
    from dataplane.tables import view

    return {
        row[family]: row["index"]
        for row in view.ports(shm)
        for family in ("ipv4", "ipv6")
        if row["kind"] == "pod" and row[family]
    }


@click.group()
def policy() -> None:
    """Network policies: what is in force, why, and what is surprising."""


@policy.command()
@click.argument("pod", required=False)
@config_option
@output_option
def get(config: Any, path: Path | None, pod: str | None, output: str) -> None:
    """What is in force for the pods of this node, or for POD (namespace/name or address)."""
    view = _view(config)
    shm = view.reader.shm
    names = {
        str(address): f"{end.pod_namespace}/{end.pod_name}" if end.pod_name else end.container_id
        for end in _endpoints(config)
        for address in (end.address4, end.address6)
        if address
    }
    subjects = view.reader.subjects()
    rows: dict[int, dict[str, Any]] = {}
    for address, port in _ports(shm).items():
        identity, row = subjects.get(port, (0, 0))
        one = rows.setdefault(port, {"port": port, "pod": "", "addresses": []})
        one |= {"pod": one["pod"] or names.get(address, ""), "identity": identity, "row": row}
        one["addresses"].append(address)
    if pod is not None:
        rows = {n: one for n, one in rows.items() if pod in (one["pod"], *one["addresses"])}
        if not rows:
            click.echo(f"no pod {pod} on this node: `penstock endpoint list` shows all", err=True)
            sys.exit(1)
    for one in rows.values():
        one["policy"] = view.policy(one["row"])
    if output == "json":
        show(list(rows.values()), output)
    elif pod is None:
        columns = ("port", "pod", "addresses", "identity", "state", "entries")
        _table(_summary(rows), output, columns)
    else:
        for one in rows.values():
            _print_policy(one)


def _summary(rows: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**one, "state": one["policy"]["state"], "entries": len(one["policy"]["entries"])}
        for _, one in sorted(rows.items())
    ]


def _print_policy(one: dict[str, Any]) -> None:
    policy = one["policy"]
    audit = ", audited: nothing is dropped" if policy["audit"] else ""
    click.echo(f"{one['pod'] or one['addresses'][0]}: {policy['state']}{audit}")
    for name, rest in policy["otherwise"].items():
        click.echo(f"  {name}: the rest is {_said(rest)}")
    if policy["entries"]:
        _table(policy["entries"], "table", ENTRY_COLUMNS)


def _said(verdict: dict[str, Any]) -> str:
    by = f" by {verdict['by']}" if verdict["by"] else ""
    answer = f", answered by {verdict['answer']}" if verdict["answer"] not in ("", "drop") else ""
    return f"{'allowed' if verdict['action'] == 'allow' else 'denied'}{by}{answer}"


# --- why and lint ---------------------------------------------------------------------------------


def explainer(config: Any, folder: Path | None, whole: bool = False) -> Any:
    """Read manifests here. whole: a refused one is told, not only skipped."""
    from dataplane.control.folder import FolderSource
    from dataplane.policy.explain import Explainer
    from dataplane.policy.options import LocalEndpoint, LocalView, PolicyOptions

    source = FolderSource(folder or config.source.folder)
    objects = source.read()
    for where, why in source.errors.items():
        click.echo(f"{where}: {why}", err=True)
    if source.errors and (whole or not source.folder.is_dir()):
        click.echo("what was refused is not looked at", err=True)
    ends = () if folder else tuple(_endpoints(config))
    local = tuple(
        LocalEndpoint(
            0,
            end.pod_namespace,
            end.pod_name,
            tuple(at for at in (end.address4, end.address6) if at is not None),
        )
        for end in ends
    )
    options = PolicyOptions(config.policy.enforcement, config.policy.cidr_match)
    view = LocalView(config.node.name, endpoints=local, clusters=tuple(config.network.clusters))
    return Explainer(objects, options, view, _names(config, folder)), bool(source.errors)


def _names(config: Any, folder: Path | None) -> Any:
    """Where DNS names lead on this node; None without its tables, and for another's manifests."""
    from dataplane.tables.names_view import NameReader
    from dataplane.tables.shm import LAYOUT, Shm

    if folder or not (config.run_dir / "shm" / LAYOUT).exists():
        return None
    return NameReader(Shm.open(config.run_dir))


policy.add_command(try_)


@policy.command()
@click.argument("source")
@click.argument("target")
@click.argument("port")
@click.option(
    "--manifests",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Judge the manifests of this folder instead of what the agent has.",
)
@config_option
@output_option
def why(
    config: Any,
    path: Path | None,
    source: str,
    target: str,
    port: str,
    manifests: Path | None,
    output: str,
) -> None:
    """Whether SOURCE may open a connection to TARGET, by which rules, and what would change it.

    SOURCE and TARGET are NAMESPACE/POD or an address, TARGET also NAMESPACE/SERVICE. PORT is such
    as 80/tcp, 53/udp or icmp. Exit status 1: denied.

    Example: penstock policy why shop/web db/postgres 5432/tcp
    """
    answer = _ask_why(config, source, target, port, manifests)
    if manifests is None:
        _add_in_force(config, answer)
    if output == "json":
        show(answer, output)
    else:
        _print_why(answer)
    sys.exit(0 if answer["allowed"] else DENIED)


def _ask_why(
    config: Any, source: str, target: str, port: str, manifests: Path | None
) -> dict[str, Any]:
    from dataplane.control.jsonl import RemoteError, Unreachable
    from dataplane.policy.why import Why, question

    if manifests is None:
        try:
            return ask(config, "why", source=source, target=target, port=port)
        except Unreachable:
            click.echo(f"the agent is away: judging {config.source.folder}", err=True)
        except RemoteError as error:
            if "unknown operation" not in str(error):
                raise
            click.echo(f"the agent is an older one: judging {config.source.folder}", err=True)
    explain, _ = explainer(config, manifests)
    return Why(explain).answer(question(source, target, port))


def _add_in_force(config: Any, answer: dict[str, Any]) -> None:
    """Add what the tables of this node say of its own pods."""
    from dataplane.policy.explain import PROTOCOLS
    from dataplane.tables.errors import TableError

    try:
        view = _view(config)
    except TableError:
        return
    local = _ports(view.reader.shm)
    for one in [answer, *answer.get("families", {}).values()]:
        if "addresses" not in one:
            continue
        number, _, protocol = one["port"].partition("/")
        source, target = one["addresses"]
        for name, turn, mine, peer in (
            ("egress", 1, source, target),
            ("ingress", 0, target, source),
        ):
            if mine in local:
                said = view.verdict(local[mine], peer, turn, PROTOCOLS[protocol], int(number))
                one[name]["in_force"] = said


def _print_why(answer: dict[str, Any]) -> None:
    verdict = "allowed" if answer["allowed"] else "DENIED"
    through = f" through service {answer['service']}" if "service" in answer else ""
    click.echo(f"{answer['source']} to {answer['target']}{through} {answer['port']}: {verdict}")
    if answer.get("endpoints_denied"):
        click.echo(f"  {answer['endpoints_denied']} of {answer['endpoints']} endpoints are denied")
    for family, one in answer.get("families", {}).items():
        click.echo(f"{family}:")
        _print_why(one)
    for name in ("egress", "ingress"):
        if name in answer:
            _print_direction(name, answer[name])
    for hint in answer.get("change", ()):
        click.echo(f"  to change it: {hint}")
    if answer.get("note"):
        click.echo(f"  {answer['note']}")


def _print_direction(name: str, one: dict[str, Any]) -> None:
    verdict = "allowed" if one["allowed"] else "denied"
    click.echo(f"  {name}: {verdict}: {one['why']}")
    for rule in one["rules"]:
        click.echo(f"    {rule}")
    if one["isolated_by"]:
        click.echo(f"    isolated by {', '.join(one['isolated_by'])}")
    if "in_force" in one:
        differs = (one["in_force"]["action"] == "allow") != one["allowed"]
        mark = "  (differs: the agent is not done, or has refused something)" if differs else ""
        click.echo(f"    in force on this node: {_said(one['in_force'])}{mark}")


@policy.command()
@click.argument(
    "folder", required=False, type=click.Path(path_type=Path, file_okay=False, exists=True)
)
@config_option
@output_option
def lint(config: Any, path: Path | None, folder: Path | None, output: str) -> None:
    """Rules that do not do what they seem to; of FOLDER, or of source.folder.

    Exit status 1: something was refused, or there are warnings.
    """
    from dataplane.policy.lint import Linter

    explain, refused = explainer(config, folder, whole=True)
    rows = [one.plain() for one in Linter(explain).findings()]
    if output == "json":
        show(rows, output)
    else:
        for one in rows:
            where = " ".join(part for part in (one["policy"], one["rule"]) if part)
            click.echo(f"{one['severity']}: {where}: {one['text']} [{one['code']}]")
        if not rows:
            click.echo("nothing surprising", err=True)
    sys.exit(1 if refused or any(one["severity"] == "warning" for one in rows) else 0)


# --- identities -----------------------------------------------------------------------------------


@click.group(cls=ListGroup)
def identity() -> None:
    """Identities: sets of labels with a number."""


@identity.command("list")
@config_option
@output_option
def identity_list(config: Any, path: Path | None, output: str) -> None:
    """All that an address has."""
    rows = _view(config).identities()
    _table(rows, output, ("identity", "labels", "prefixes", "example", "groups"))


@click.group(cls=ListGroup)
def ip() -> None:
    """What addresses are."""


@ip.command("list")
@config_option
@output_option
def ip_list(config: Any, path: Path | None, output: str) -> None:
    """All prefixes with their identities."""
    _table(_view(config).addresses(), output, ADDRESS_COLUMNS)


@ip.command("get")
@click.argument("address")
@config_option
@output_option
def ip_get(config: Any, path: Path | None, address: str, output: str) -> None:
    """What ADDRESS is, by its longest prefix."""
    try:
        ip_address(address)
    except ValueError as error:
        raise click.BadParameter(f"{address!r} is no IPv4 or IPv6 address") from error
    _table([_view(config).address(address)], output, ADDRESS_COLUMNS)
