"""penstock observe.

Rule: flags, defaults and output are those of `hubble observe`.

Theory. A client of Hubble's API: of this node's observer over its socket file, or of any server
that speaks it (--server). `--not` is about the flag behind it, so it is made a part of that flag's
name before click reads them.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import config_option

LAST = 20
SHORT = {"-t": "type", "-n": "namespace", "-l": "label", "-A": "all-namespaces", "-4": "ipv4",
         "-6": "ipv6"}  # fmt: skip
RARE = ("http-", "trace-id", "ip-trace-id", "cel-expression", "encrypted", "unencrypted")
TIMES = click.Choice(
    ["StampMilli", "YearMonthDay", "YearMonthDayHour", "YearMonthDayHourMinute", "RFC3339",
     "RFC3339Milli", "RFC3339Micro", "RFC3339Nano", "RFC1123Z"], case_sensitive=False,
)  # fmt: skip
HELP = {
    "pod": "[NAMESPACE/]PREFIX of a pod's name, namespace default otherwise.",
    "namespace": "Namespace of pods and services.", "all-namespaces": "Pods of any namespace.",
    "ip": "Address or CIDR.", "fqdn": "DNS name of the address, with *.",
    "label": "Label selector: app=web,tier!=x.", "service": "[NAMESPACE/]PREFIX of a service.",
    "port": "Port of TCP, UDP, SCTP.", "workload": "[KIND/]NAME.",
    "identity": "Number, or a reserved one: world, host, ...", "cluster": "Its name.",
    "verdict": "FORWARDED, DROPPED, AUDIT, ...", "drop-reason-desc": "POLICY_DENIED, ...",
    "protocol": "tcp, udp, icmp, sctp, dns, ...", "tcp-flags": "All of these: SYN,ACK.",
    "type": "drop, trace[:to-endpoint], policy-verdict, l7.",
    "traffic-direction": "ingress or egress.", "node-name": "[CLUSTER/]NODE, with *.",
    "node-label": "Label selector of nodes.", "uuid": "The flow itself.",
    "ip-version": "none, v4 or v6.", "snat-ip": "What the source is masqueraded as.",
    "interface": "Device at which it came in.", "ipv4": "Only IPv4.", "ipv6": "Only IPv6.",
}  # fmt: skip
ENDS = {"from": "source", "to": "destination"}
FORMS = ("compact", "dict", "json", "jsonpb", "table", "tab", "JSON")
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


class NotCommand(click.Command):
    """Understands --not in front of a flag."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        made: list[str] = []
        turned = False
        for word in args:
            if word == "--not" and turned:
                raise click.UsageError("--not --not: a flag must follow each")
            if word == "--not":
                turned = True
            elif turned:
                name = SHORT.get(word) or word.removeprefix("--")
                made.append(f"--not-{name}")
                turned = False
            else:
                made.append(word)
        if turned:
            raise click.UsageError("--not: a flag must follow, such as --not --verdict DROPPED")
        return super().parse_args(ctx, made)


def _filter_options(function: Callable) -> Callable:
    from dataplane.observe.flags import FLAGS, SWITCHES

    for flag in reversed(FLAGS):
        short = [short for short, name in SHORT.items() if name == flag]
        way, _, bare = flag.partition("-")
        text = f"As --{bare}, of the {ENDS[way]}." if way in ENDS else HELP.get(flag)
        for twin in ("", "not-"):
            kind: dict[str, Any] = {"is_flag": True} if flag in SWITCHES else {"multiple": True}
            function = click.option(
                f"--{twin}{flag}", f"{twin}{flag}".replace("-", "_"), *([] if twin else short),
                hidden=bool(twin) or flag.startswith(RARE), help=text, **kind,
            )(function)  # fmt: skip
    return function


@click.command(cls=NotCommand)
@click.option("--last", type=click.IntRange(0), help=f"The last so many.  [default: {LAST}]")
@click.option("--first", type=click.IntRange(1), help="The first so many.")
@click.option("--all", "everything", is_flag=True, help="All that are kept.")
@click.option("-f", "--follow", is_flag=True, help="Then what comes.")
@click.option("--since", help="Ago (5m), or a time (RFC 3339, UTC without a zone).")
@click.option("--until", help="As --since.")
@_filter_options
@click.option("--allowlist", multiple=True, help="flow.FlowFilters in JSON: any of these.")
@click.option("--denylist", multiple=True, help="And none of these.")
@click.option("-o", "--output", default="compact", show_default=True, metavar="[compact|dict|json|"
              "jsonpb|table]", type=click.Choice(FORMS))  # fmt: skip
@click.option("--time-format", default="StampMilli", show_default=True, type=TIMES,
              help="Of times, which are UTC; JSON has its own.")  # fmt: skip
@click.option("--print-node-name", is_flag=True, help="Show the node.")
@click.option("--print-policy-names", is_flag=True, help="Show which policies decided.")
@click.option("--ip-translation/--no-ip-translation", default=True, help="Names for addresses.")
@click.option("--numeric", is_flag=True, help="As --no-ip-translation.")
@click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto",
              show_default=True)  # fmt: skip
@click.option("--field-mask", multiple=True, help="Only these members of flow.Flow (JSON only).")
@click.option("--print-raw-filters", is_flag=True, help="Show the filters and end.")
@click.option(
    "--input",
    "--input-file",
    "input_path",
    type=click.Path(path_type=Path),
    help="Recorded flows: a Parquet file or a folder of them; lines of JSON, -: stdin.",
)
@click.option("--server", help="host:port or unix:///PATH instead of this node's observer.")
@click.option("--tls-ca-cert-file", "--tls-ca-cert-files", "tls_ca_cert_file", type=FILE,
              help="The server has TLS, with this authority.")  # fmt: skip
@click.option("--tls-client-cert-file", type=FILE, help="And wants this certificate,")
@click.option("--tls-client-key-file", type=FILE, help="with this key.")
@click.option("--tls-server-name", help="Name in the server's certificate.")
@click.option("--status", "ask_status", is_flag=True, help="What the server keeps, instead.")
@config_option
def observe(config: Any, path: Path | None, **options: Any) -> None:
    """Flows, as `hubble observe` shows them; --not turns the flag behind it round.

    Examples:

      penstock observe --pod shop/web -f

      penstock observe --verdict DROPPED --since 5m -o json --print-policy-names

      penstock observe --namespace shop --not --protocol udp
    """
    from dataplane.observe.filters import FilterError
    from dataplane.observe.printer import Printer

    try:
        request = _request(options)
    except FilterError as error:
        raise click.UsageError(str(error)) from error
    printer = Printer(
        {"tab": "table", "JSON": "json"}.get(options["output"], options["output"]),
        options["time_format"], options["print_node_name"],
        options["ip_translation"] and not options["numeric"], options["print_policy_names"],
        _colored(options["color"]),
    )  # fmt: skip
    if options["print_raw_filters"]:
        _print_filters(request)
        return
    try:
        if options["ask_status"]:
            _status(_channel(config, options))
            return
        answers = (
            _recorded(options["input_path"], request)
            if options["input_path"]
            else _answers(_channel(config, options), request)
        )
        for line in printer.lines(answers):
            click.echo(line, color=True)
    except KeyboardInterrupt:
        sys.exit(0)


def _colored(choice: str) -> bool:
    """Whether lines are colored: on a terminal, unless NO_COLOR (no-color.org) is set."""
    return choice == "always" or (
        choice == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )


def _exclusive(options: dict[str, Any]) -> None:
    """Refuse what excludes each other."""
    last = bool(options["last"])
    table = options["output"] in ("table", "tab")
    masked = options["field_mask"] and options["output"] not in ("json", "jsonpb", "JSON")
    for wrong, text in (
        (options["first"] and last, "--first and --last exclude each other"),
        (options["first"] and options["everything"], "--first and --all exclude each other"),
        (options["first"] and options["follow"], "--first and --follow exclude each other"),
        (last and options["everything"], "--last and --all exclude each other"),
        (table and options["follow"], "-o table and --follow exclude each other: it comes whole"),
        (masked, "--field-mask leaves out what lines show: take it with -o json"),
    ):
        if wrong:
            raise click.UsageError(text)


def _text(options: dict[str, Any]) -> bool:
    """Whether flows come from lines of JSON: then all are shown."""
    from dataplane.observe import lines

    path = options["input_path"]
    return path is not None and (str(path) == "-" or lines.is_text(path))


def _request(options: dict[str, Any]) -> Any:
    from dataplane.observe.flags import FLAGS, SWITCHES, filters, raw
    from dataplane.observe.moments import moment
    from dataplane.observe.protocol import message

    def given(prefix: str) -> dict[str, Sequence[str]]:
        values = {flag: options[f"{prefix}{flag}".replace("-", "_")] for flag in FLAGS}
        return {
            flag: [flag] * value if flag in SWITCHES else value for flag, value in values.items()
        }

    _exclusive(options)
    request = message("observer.GetFlowsRequest")(follow=options["follow"])
    request.whitelist.extend(filters(given("")) + raw(options["allowlist"]))
    request.blacklist.extend(filters(given("not-")) + raw(options["denylist"]))
    for name in ("since", "until"):
        if options[name] and not (name == "until" and options["follow"]):
            getattr(request, name).FromDatetime(moment(options[name]))
    if options["first"]:
        request.number, request.first = options["first"], True
    elif options["everything"]:
        request.number = (1 << 63) - 1
    elif options["last"]:
        request.number = options["last"]
    elif not (options["follow"] or options["since"] or options["until"] or _text(options)):
        request.number = LAST
    for paths in options["field_mask"]:
        request.field_mask.paths.extend(paths.split(","))
    return request


def _print_filters(request: Any) -> None:
    """Print filters as --allowlist and --denylist take them."""
    import yaml
    from google.protobuf import json_format

    lists = {"allowlist": request.whitelist, "denylist": request.blacklist}
    shown = {
        name: [
            json_format.MessageToJson(one, preserving_proto_field_name=True, indent=None)
            for one in some
        ]
        for name, some in lists.items()
        if some
    }
    click.echo(yaml.safe_dump(shown, width=1 << 16) if shown else "{}", nl=not shown)


def _recorded(path: Path, request: Any) -> Iterator[Any]:
    from dataplane.observe import lines, past

    if str(path) == "-":
        yield from lines.answers(sys.stdin, request)
        return
    if request.follow:
        raise click.UsageError("--follow and --input exclude each other: a file does not grow")
    if _text({"input_path": path}):
        with path.open() as file:
            yield from lines.answers(file, request)
    else:
        yield from past.answers(path, request)


def _channel(config: Any, options: dict[str, Any]) -> Any:
    import grpc

    from dataplane.observe.protocol import SOCKET

    server = options["server"] or f"unix://{config.run_dir / SOCKET}"
    if not options["tls_ca_cert_file"]:
        return grpc.insecure_channel(server)
    files = (options[f"tls_{name}"] for name in ("ca_cert_file", "client_key_file",
                                                 "client_cert_file"))  # fmt: skip
    made = grpc.ssl_channel_credentials(*(file.read_bytes() if file else None for file in files))
    name = options["tls_server_name"]
    more = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.secure_channel(server, made, more)


def _answers(channel: Any, request: Any) -> Iterator[Any]:
    import grpc

    from dataplane.observe.protocol import OBSERVER, stub

    try:
        yield from stub(channel, OBSERVER, "GetFlows")(request)
    except grpc.RpcError as error:
        raise ValueError(_said(error)) from error


def _said(error: Any) -> str:
    import grpc

    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return f"no observer answers ({error.details()}): is `penstock run` up?"
    return f"the server refuses: {error.details()}"


def _status(channel: Any) -> None:
    import grpc

    from dataplane.observe.protocol import OBSERVER, message, stub

    try:
        state = stub(channel, OBSERVER, "ServerStatus")(message("observer.ServerStatusRequest")())
    except grpc.RpcError as error:
        raise ValueError(_said(error)) from error
    share = 100 * state.num_flows / max(1, state.max_flows)
    click.echo(f"Flows:   {state.num_flows:,}/{state.max_flows:,} ({share:.2f}%)")
    click.echo(f"Seen:    {state.seen_flows:,}, {state.flows_rate:,.1f} a second")
    click.echo(f"Uptime:  {state.uptime_ns / 1e9:.0f} s")
    click.echo(f"Version: {state.version}")
