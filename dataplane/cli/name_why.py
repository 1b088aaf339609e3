"""penstock fqdn why NAME --pod: why this pod cannot reach that name, in one answer.

Rule: tables and rings are read from shared memory; policies are judged by the agent, or here from
the manifests while it is away.

Theory. One question, whatever is in the way: DNS, rules by name, stale addresses, policy of either
end, a service without backends, the MTU, a server that is silent (policy/reach.py, reasons.py).
"""

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import ask, config_option, output_option, show

EVENTS_SHOWN = 3
EVENTS_KEPT = 20  # in JSON
COUNTS = ("queries", "answers", "refused", "failures", "missing")


@click.command()
@click.argument("name")
@click.option("--pod", default="", help="NAMESPACE/POD: what stands in its way.")
@click.option("--port", help="Of the connection, such as 443/tcp  [default: those it has tried].")
@config_option
@output_option
def why(config: Any, path: Path | None, name: str, pod: str, port: str | None, output: str) -> None:
    """Why a pod cannot reach NAME: DNS, policy of both ends, service, MTU; what was dropped lately.

    Without --pod: what is known of NAME on this node. Exit status 1: there is a reason.

    Example: penstock fqdn why example.com --pod shop/web
    """
    from dataplane.daemon.engines import RULES
    from dataplane.policy.name_why import why as of_name
    from dataplane.tables import view
    from dataplane.tables.shm import Shm

    _check(name, pod, port)
    if port and "/" not in port and port.isdecimal():
        port = f"{port}/tcp"
    shm, end = Shm.open(config.run_dir), None
    if pod:
        end = _endpoint(config, pod)
        ports = [row["index"] for row in view.ports(shm) if end and row["endpoint"] == end.number]
        if not ports:
            where = "" if "/" in pod else ", named NAMESPACE/POD"
            shown = f"no pod {pod} on this node{where}: `penstock endpoint list` shows all"
            click.echo(shown, err=True)
            sys.exit(2)
        found = _of_pod(config, shm, of_name(shm, shm.folder / RULES, name, ports[0]), end, port)
    else:
        found = of_name(shm, shm.folder / RULES, name)
    found["events"] = found["events"][-EVENTS_KEPT:]
    for part in ("reasons", "perhaps"):
        found[part] = [dataclasses.asdict(one) for one in found.get(part, ())]
    if output == "json":
        show(found, output)
    else:
        _print(found, pod)
    sys.exit(1 if found["reasons"] else 0)


def _check(name: str, pod: str, port: str | None) -> None:
    """Refuse what is no question: an address, no name, no port."""
    from ipaddress import ip_address

    from dataplane.policy.explain import Unknown
    from dataplane.policy.why import question

    if not name.strip("."):
        raise click.BadParameter("it is empty", param_hint="NAME")
    with contextlib.suppress(ValueError):
        ip_address(name)
        asked = f"penstock policy why {pod or 'NAMESPACE/POD'} {name} {port or '443/tcp'}"
        raise click.BadParameter(f"{name} is an address: `{asked}`", param_hint="NAME")
    try:
        question("", "", port or "443/tcp")
    except Unknown as error:
        raise click.BadParameter(str(error), param_hint="--port") from error


def _endpoint(config: Any, pod: str) -> Any:
    from dataplane.cni.endpoints import Endpoints

    ends = Endpoints(config.state_dir) if (config.state_dir / "endpoints").is_dir() else ()
    return next((one for one in ends if f"{one.pod_namespace}/{one.pod_name}" == pod), None)


def _of_pod(config: Any, shm: Any, known: dict[str, Any], end: Any, port: str | None) -> Any:
    """Return what is known of a name and a pod, with the reasons."""
    from dataplane.daemon.engines import RULES
    from dataplane.policy.reach import Asked, Reach, service_name
    from dataplane.policy.reasons import explain
    from dataplane.policy.view import rule_names
    from dataplane.services import names

    asked = Asked(
        f"{end.pod_namespace}/{end.pod_name}",
        tuple(at for at in (end.address4, end.address6) if at is not None),
        known,
        service_name(known["name"], config.dns.cluster_domain),
        port,
    )
    called = {
        row: names.split(text)[0] for row, text in names.read(shm.folder / names.FILE).items()
    }
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    judge, rules = _judge(config), shm.folder / RULES
    return explain(Reach(shm, asked, judge, called, lambda words: rule_names(rules, words), now))


def _judge(config: Any) -> Any:
    """Return who answers `policy why`: the agent, or the manifests once it has not answered."""
    from dataplane.cli.policy import explainer
    from dataplane.control.jsonl import RemoteError, Unreachable
    from dataplane.policy.explain import Unknown
    from dataplane.policy.why import Why, question

    here: list[Why] = []

    def judge(source: str, target: str, port: str) -> Any:
        if not here:
            try:
                return ask(config, "why", source=source, target=target, port=port)
            except Unreachable:
                click.echo(f"the agent is away: judging {config.source.folder}", err=True)
            except RemoteError as error:
                raise Unknown(str(error)) from error
            here.append(Why(explainer(config, None)[0]))
        return here[0].answer(question(source, target, port))

    return judge


# --- for people -----------------------------------------------------------------------------------


def _print(found: dict[str, Any], pod: str) -> None:
    click.echo(f"{found['name']} fits {', '.join(found['patterns']) or 'no pattern of a policy'}")
    for one in found["addresses"]:
        left = "kept by a connection" if one["kept"] else f"for {one['expires_s']} s"
        click.echo(f"  leads to {one['address']}, {left}")
    if found["counted"]:
        click.echo("  " + ", ".join(f"{found['counted'][word]} {word}" for word in COUNTS))
    for one in found["events"][-EVENTS_SHOWN:]:
        rcode = f"{one['rcode']} " if one["kind"] in ("answer", "refused") else ""
        click.echo(f"  {one['kind']} {one['type']} {rcode}{one['client']} {one['server']}")
    for way in found.get("ways", ()):
        _print_way(way)
    if pod and not found["reasons"]:
        click.echo(f"  nothing is in the way of {pod}")
    for reason in found["reasons"]:
        click.echo(f"  WHY NOT: {reason['text']}")
    for reason in found["perhaps"]:
        click.echo(f"  perhaps: {reason['text']}")


def _print_way(way: dict[str, Any]) -> None:
    behind = ""
    if way["service"]:
        ends = ", ".join(f"{one['address']}:{one['port']}" for one in way["backends"])
        behind = f" is service {way['service']}: {ends or 'no backend'}"
    mtu = f", path MTU {way['mtu']}" if way["mtu"] else ", no route" if not behind else ""
    click.echo(f"  {way['address']} {way['port']}{behind}{mtu}")
    for one in way["policy"]:
        click.echo(f"    {_said(one)}")


def _said(one: dict[str, Any]) -> str:
    """Return a judgement in a line."""
    if "unknown" in one:
        return f"policy: {one['unknown']}"
    if "egress" not in one:  # the families differ
        return f"to {one['target']}: {'allowed' if one['allowed'] else 'denied'}"
    sides = []
    for name in ("egress", "ingress"):
        by = one[name]["rules"] or one[name]["isolated_by"]
        verdict = "allowed" if one[name]["allowed"] else "DENIED"
        sides.append(f"{name} {verdict}" + (f" by {', '.join(by)}" if by else ""))
    return f"to {one['target']}: {'; '.join(sides)}"
