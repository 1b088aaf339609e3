"""penstock observe.

Rule: flags, defaults and output are those of `hubble observe`.

Theory. A client of Hubble's API: of this node's observer over its socket file, or of any server
that speaks it (--server). `--not` is about the flag behind it, so it is made a part of that flag's
name before click reads them.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import config_option

LAST = 20
SHORT = {"-t": "type"}
TIMES = click.Choice(["StampMilli", "RFC3339", "RFC3339Milli", "RFC3339Micro"])
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


class NotCommand(click.Command):
    """Understands --not in front of a flag."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        made: list[str] = []
        turned = False
        for word in args:
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
    from dataplane.observe.flags import FLAGS

    for flag in reversed(FLAGS):
        if flag == "ip-version":
            continue
        short = [short for short, name in SHORT.items() if name == flag]
        for twin in ("", "not-"):
            function = click.option(
                f"--{twin}{flag}", f"{twin}{flag}".replace("-", "_"), *([] if twin else short),
                multiple=True, hidden=bool(twin) or flag.startswith("http"),
            )(function)  # fmt: skip
    return function


@click.command(cls=NotCommand)
@click.option("--last", type=click.IntRange(0), help=f"The last so many.  [default: {LAST}]")
@click.option("--first", type=click.IntRange(1), help="The first so many.")
@click.option("--all", "everything", is_flag=True, help="All that are kept.")
@click.option("-f", "--follow", is_flag=True, help="Then what comes.")
@click.option("--since", help="Ago (5m), or a time (RFC 3339).")
@click.option("--until", help="As --since.")
@click.option("-4", "--ipv4", "four", is_flag=True, help="Only IPv4.")
@click.option("-6", "--ipv6", "six", is_flag=True, help="Only IPv6.")
@_filter_options
@click.option("-o", "--output", default="compact", show_default=True,
              type=click.Choice(["compact", "dict", "json", "jsonpb", "table"]))  # fmt: skip
@click.option("--time-format", default="StampMilli", show_default=True, type=TIMES)
@click.option("--print-node-name", is_flag=True, help="Show the node.")
@click.option("--print-policy-names", is_flag=True, help="Show which policies decided.")
@click.option("--ip-translation/--no-ip-translation", default=True, help="Names for addresses.")
@click.option("--field-mask", help="Only these members of flow.Flow, separated by commas.")
@click.option("--print-raw-filters", is_flag=True, help="Show the filters and end.")
@click.option("--input", "--input-file", "input_path", type=click.Path(path_type=Path),
              help="Recorded flows: a Parquet file or a folder of them.")  # fmt: skip
@click.option("--server", help="host:port or unix:///PATH instead of this node's observer.")
@click.option("--tls-ca-cert-file", type=FILE, help="The server has TLS, with this authority.")
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
        options["output"], options["time_format"], options["print_node_name"],
        options["ip_translation"], options["print_policy_names"],
    )  # fmt: skip
    if options["print_raw_filters"]:
        click.echo(str(request))
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
            click.echo(line)
    except KeyboardInterrupt:
        sys.exit(0)


def _request(options: dict[str, Any]) -> Any:
    from dataplane.observe.flags import FLAGS, filters, moment
    from dataplane.observe.protocol import message

    chosen: dict[str, Sequence[str]] = {
        flag: options.get(flag.replace("-", "_"), ()) for flag in FLAGS
    }
    chosen["ip-version"] = ["4"] * options["four"] + ["6"] * options["six"]
    turned = {flag: options.get(f"not_{flag}".replace("-", "_"), ()) for flag in FLAGS}
    request = message("observer.GetFlowsRequest")(follow=options["follow"])
    request.whitelist.extend(filters(chosen))
    request.blacklist.extend(filters(turned))
    for name in ("since", "until"):
        if options[name]:
            getattr(request, name).FromDatetime(moment(options[name]))
    if options["first"]:
        request.number, request.first = options["first"], True
    elif options["everything"]:
        request.number = (1 << 63) - 1
    elif options["last"] is not None:
        request.number = options["last"]
    elif not (options["follow"] or options["since"] or options["until"]):
        request.number = LAST
    if options["field_mask"]:
        request.field_mask.paths.extend(options["field_mask"].split(","))
    return request


def _recorded(path: Path, request: Any) -> Iterator[Any]:
    from dataplane.observe.past import answers

    if request.follow:
        raise click.UsageError("--follow and --input exclude each other: a file does not grow")
    yield from answers(path, request)


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
