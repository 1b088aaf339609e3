"""penstock capture, trace.

Rule: what is written is what the workers had, at the point that was asked for, with the verdict and
its rule; what was lost is said, to the packet.

Theory. The forwarder opens a tap; this process reads its rings and writes pcapng, lines or stages.
Without -w packets are lines on the terminal. With --pod they are those that cross the pod's device,
both ways, as tcpdump on it would show them; without, each packet once, as it came. A capture that
wants forwarded packets keeps the flow table in XDP at rest meanwhile, which costs throughput.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import click

from dataplane.cli.common import config_option

POLL_S = 0.02
POINTS = {"in": 1, "out": 2, "both": 3}
STAGES = 4
VERDICTS = ("forwarded", "dropped", "any")


def selection(function: Callable) -> Callable:
    """Add the options that select packets."""
    options = [
        click.argument("filter", nargs=-1),
        click.option("--pod", default="", help="namespace/pod, address or device."),
        click.option("--identity", type=int, default=0, help="Of the source or the target."),
        click.option("--verdict", type=click.Choice(VERDICTS), default="any", show_default=True),
        click.option(
            "--reason",
            "reasons",
            multiple=True,
            help="Number or text, such as 133 or 'Policy denied'; may be repeated.",
        ),
        click.option("-c", "--count", type=click.IntRange(1), help="End after so many packets."),
        click.option("--seconds", type=float, help="End after so long."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


class Session:
    """An open tap of this node's forwarder."""

    def __init__(self, config: Any, wanted: dict[str, Any]) -> None:
        """wanted: as Taps.open takes it."""
        from dataplane.capture.reader import TapReader
        from dataplane.control.jsonl import call
        from dataplane.tables.shm import Shm

        self._socket = config.run_dir / "forwarder.sock"
        self._shm = Shm.open(config.run_dir, writable=True)
        self._tap = call(self._socket, "tap", **wanted)
        self.reader = TapReader(self._shm, **self._tap)
        self.words = words(config, self._shm)

    def packets(self, count: int | None, seconds: float | None) -> Iterator[list[Any]]:
        """Yield what comes, a list a turn (perhaps empty), until the end that was asked for."""
        end = time.monotonic() + seconds if seconds is not None else float("inf")
        left = count if count is not None else sys.maxsize
        while left > 0 and time.monotonic() < end:
            found = self.reader.read()[:left]
            left -= len(found)
            yield found
            if not found:
                time.sleep(POLL_S)
        self.close()
        yield self.reader.drain()[:left]

    def close(self) -> None:
        """Close the tap; twice is fine."""
        from dataplane.control.jsonl import RemoteError, Unreachable, call

        with suppress(Unreachable, RemoteError):  # a forwarder that has ended has no taps
            call(self._socket, "untap", **self._tap)


@contextmanager
def session(config: Any, wanted: dict[str, Any]) -> Iterator[Session]:
    """Open a tap for the body; SIGINT and SIGTERM end it well."""
    import signal

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)  # a shell's background job would ignore it
    one = Session(config, wanted)
    try:
        yield one
    finally:
        one.close()


def words(config: Any, shm: Any) -> Any:
    """Names of devices, pods and rules."""
    from dataplane.capture.words import Words
    from dataplane.daemon.engines import RULES

    return Words(shm, shm.folder / RULES, owners(config))


def owners(config: Any) -> dict[str, str]:
    """Device -> namespace/pod, from the records on disk."""
    from dataplane.cni.endpoints import Endpoints

    if not (config.state_dir / "endpoints").is_dir():
        return {}
    return {
        end.host_ifname: f"{end.pod_namespace}/{end.pod_name}" if end.pod_name else end.ifname
        for end in Endpoints(config.state_dir)
    }


def asked(
    config: Any, filter: tuple[str, ...], pod: str, identity: int, verdict: str,
    reasons: tuple[str, ...], point: str = "", snap: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Return what to ask the forwarder for. Raises FilterError, click.BadParameter."""
    from dataplane.capture.filters import compile_filter

    port = _port(config, pod) if pod else None
    point = point or ("both" if pod else "in")
    return {
        "points": POINTS[point],
        "snap": snap,
        "port": port,
        "identity": identity,
        "reasons": _reasons(verdict, reasons),
        "program": compile_filter(" ".join(filter)).tobytes().hex(),
    }


def _reasons(verdict: str, reasons: tuple[str, ...]) -> list[int] | None:
    from dataplane.observe.protocol import enum
    from xdp.abi import REASON_TEXT

    if not reasons:
        wanted = {"any": None, "dropped": range(130, 256), "forwarded": range(130)}[verdict]
        return None if wanted is None else list(wanted)
    by_text = {text.lower(): number for number, text in REASON_TEXT.items()}
    by_name = {name: number for name, number in enum("flow.DropReason").items() if number}
    found = []
    for text in reasons:
        named = by_text.get(text.lower(), by_name.get(text.upper(), -1))
        number = int(text) if text.isdigit() else named
        if not 0 <= number < 256:
            known = ", ".join(sorted(by_text))
            raise click.BadParameter(
                f"{text!r} is no reason; known: {known}", param_hint="--reason"
            )
        found.append(number)
    return found


def _port(config: Any, pod: str) -> int:
    """The port that a pod's name, an address of it or a device's name stand for."""
    from dataplane.tables import view
    from dataplane.tables.shm import Shm

    names = owners(config)
    for row in view.ports(Shm.open(config.run_dir)):
        if pod in (row["name"], row["ipv4"], row["ipv6"], names.get(row["name"])):
            return row["index"]
    raise click.BadParameter(
        f"no pod or device {pod!r} on this node: `penstock endpoint list` shows all",
        param_hint="--pod",
    )


@click.command()
@selection
@click.option("-w", "--write", default="", help="pcapng file, - for stdout.")
@click.option("--point", type=click.Choice(list(POINTS)), help="As packets came, left, or both.")
@click.option("-s", "--snaplen", type=click.IntRange(0, 65536), default=0, help="Bytes of each.")
@config_option
def capture(
    config: Any, path: Path | None, write: str, point: str | None, snaplen: int,
    count: int | None, seconds: float | None, filter: tuple[str, ...], **select: Any,
) -> None:  # fmt: skip
    """Packets that FILTER (pcap-filter(7)) takes, with their verdict, as pcapng or lines.

    penstock capture --verdict dropped -w - | wireshark -k -i -
    """
    wanted = asked(config, filter, point=point or "", snap=snaplen, **select)
    if write == "-" and sys.stdout.isatty():
        raise click.UsageError("-w - writes binary pcapng: send it to a file or to wireshark")
    with session(config, wanted) as one:
        try:
            if not write:
                seen = _print(one, count, seconds)
            elif write == "-":
                seen = write_packets(one, sys.stdout.buffer, count, seconds)
            else:
                with open(write, "wb") as file:
                    seen = write_packets(one, file, count, seconds)
        except BrokenPipeError:  # Wireshark was closed; Python would flush into the pipe again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
    click.echo(f"{seen} packets captured, {one.reader.lost} lost", err=True)


def _print(one: Session, count: int | None, seconds: float | None) -> int:
    seen = 0
    try:
        for found in one.packets(count, seconds):
            seen += len(found)
            for packet in found:
                click.echo(f"{_clock(packet)} {one.words.line(packet)}")
    except KeyboardInterrupt:
        pass
    return seen


def _clock(packet: Any) -> str:
    from dataplane.capture.reader import clock_offset_ns

    moment = int(packet.record["time_ns"]) + clock_offset_ns()
    return f"{time.strftime('%H:%M:%S', time.localtime(moment // 10**9))}.{moment % 10**9:09d}"


def write_packets(
    one: Session, file: BinaryIO, count: int | None = None, seconds: float | None = None
) -> int:
    """Write a capture as pcapng until its end; return how many packets."""
    from dataplane.capture.pcapng import Writer
    from dataplane.capture.reader import clock_offset_ns
    from xdp.abi import CONST

    writer = Writer(file, "penstock", CONST["TAP_SNAP_MOST"])
    seen, offset = 0, clock_offset_ns()

    def put(found: list[Any]) -> None:
        for packet in found:
            row, words = packet.record, one.words
            port = int(row["port"])
            interface = writer.interface(words.device(port), words.owner(port))
            moment = int(row["time_ns"]) + offset
            length, comment = int(row["length"]), words.comment(packet)
            writer.packet(interface, moment, packet.data, length, packet.inbound, comment)
        writer.flush()

    try:
        for found in one.packets(count, seconds):
            put(found)
            seen += len(found)
    except KeyboardInterrupt:
        one.close()
        rest = one.reader.drain()
        put(rest)
        seen += len(rest)
    writer.end(time.time_ns(), one.reader.lost)
    return seen


@click.command()
@selection
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text")
@config_option
def trace(
    config: Any, path: Path | None, output: str, count: int | None, seconds: float | None,
    filter: tuple[str, ...], **select: Any,
) -> None:  # fmt: skip
    """The next packets (-c, 1) that FILTER takes, through every stage, with the time of each.

    A stage works on a whole vector: its time is the vector's, divided by the packets in it.
    """
    import json

    from dataplane.capture.words import stages, summary

    wanted = asked(config, filter, point="in" if not select["pod"] else "both", **select)
    wanted["points"] |= STAGES
    seen = 0
    with session(config, wanted) as one:
        try:
            for found in one.packets(count or 1, seconds):
                for packet in found:
                    seen += 1
                    row = packet.record
                    told = {
                        "packet": summary(packet.data),
                        "at": one.words.place(int(row["port"])),
                        "point": "in" if packet.inbound else "out",
                        "length": int(row["length"]),
                        "vector": int(row["vector"]),
                        "end": one.words.comment(packet),
                        "stages": stages(packet, one.words),
                    }
                    click.echo(json.dumps(told) if output == "json" else _traced(told))
        except KeyboardInterrupt:
            pass
    if not seen:
        click.echo("no packet came that the filter takes", err=True)
        sys.exit(1)


def _traced(told: dict[str, Any]) -> str:
    head = f"{told['packet']}  {told['point']} {told['at']}, {told['length']} bytes"
    lines = [f"{head}, in a vector of {told['vector']}"]
    for row in told["stages"]:
        lines.append(f"  {row['stage']:<10} {row['ns']:>9.1f} ns  {row['after']}")
    return "\n".join([*lines, f"  => {told['end']}"])
