"""The driver `trex`: TRex's own client speaks to a TRex server, by default to ours (bench/trex).

Rule: nothing is asked of a server that TRex's stateless API does not have.

Theory. With --server HOST its port 0 must be wired to where the client pod sends and port 1 to
where the server pod receives; without it our own server takes both pods' interfaces, which proves
the way from a TRex script to the wire and back. Flows are made by the field engine, packets are
counted by a packet group, times come from a slow latency stream beside the load, as TRex users do.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from bench import traffic
from bench.drivers import Trial
from bench.drivers.frames import WARM_S, answer
from bench.histogram import NONE, Histogram
from bench.lab import LabError, eventually
from bench.scenario import Case
from bench.subjects.base import DEVICE, GENERATOR_CPU, Subject
from bench.usage import between, moment

GROUP, TIMED = 1, 2  # packet groups: the load, the latency stream
TIMED_PPS = 1000
SETTLE_S = 0.1
LOCAL = "127.0.0.1"
SYNC, ASYNC = 14501, 14500  # of our own server: a TRex beside us keeps its ports


class Trex:
    """A session."""

    def __init__(self, subject: Subject, case: Case, client: Any, api: Any) -> None:
        """client: a connected STLClient; api: the module trex.stl.api."""
        self._subject, self._case = subject, case
        self._client, self._api = client, api
        self._path = subject.path()
        self._sizes = traffic.sizes(case.traffic.size, self._path.family)

    def _program(self) -> Any:
        """Every flow in turn: source ports, then target ports."""
        api, sent = self._api, self._case.traffic
        at = traffic.HEADERS[self._path.family] - 8
        sources = min(sent.flows, 1 << sent.source_bits)
        first = traffic.SOURCE_PORT
        words = [
            api.STLVmFlowVar("source", None, first, first + sources - 1, 2, 1, "inc"),
            api.STLVmWrFlowVar("source", at),
        ]
        if sent.ports > 1:
            target = self._path.target_port
            words[0].next_var = "target"
            words.insert(
                1, api.STLVmFlowVar("target", None, target, target + sent.ports - 1, 2, 1, "inc")
            )
            words.append(api.STLVmWrFlowVar("target", at + 2))
        if self._path.family == 6 or sent.checksum:
            words.append(api.STLVmFixChecksumHw(14, at - 14, api.CTRexVmInsFixHwCs.L4_TYPE_UDP))
        return api.STLScVmRaw(words)

    def _stream(self, size: int, mode: Any, group: Any) -> Any:
        whole = bytearray(traffic.frame(self._path, size))
        macs = (self._path.target_mac + self._path.source_mac).replace(":", "")
        whole[:12] = bytes.fromhex(macs)
        packet = self._api.STLPktBuilder(pkt_buffer=bytes(whole), vm=self._program())
        return self._api.STLStream(
            packet=packet, mode=mode, flow_stats=group,
            mac_src_override_by_pkt=True, mac_dst_override_mode=1,
        )  # fmt: skip

    def _load(self, rate: float, burst: int = 0, stamp: bool = False) -> None:
        """Replace the streams. rate: of all together, frames a second."""
        api, count = self._api, len(self._sizes)
        streams = []
        for size in dict.fromkeys(self._sizes):
            share = self._sizes.count(size) / count
            mode = api.STLTXCont(pps=rate * share)
            if burst:
                mode = api.STLTXSingleBurst(
                    pps=rate * share, total_pkts=max(1, round(burst * share))
                )
            streams.append(self._stream(size, mode, api.STLFlowStats(pg_id=GROUP)))
        if stamp:
            least = 16 + traffic.HEADERS[self._path.family] + traffic.FCS
            mode = api.STLTXCont(pps=TIMED_PPS)
            group = api.STLFlowLatencyStats(pg_id=TIMED)
            streams.append(self._stream(max(least, self._sizes[0]), mode, group))
        self._client.remove_all_streams(ports=[0])
        self._client.add_streams(streams, ports=[0])

    def _counts(self) -> tuple[int, int]:
        found = self._client.get_pgid_stats([GROUP])["flow_stats"].get(GROUP, {})
        return (
            int(found.get("tx_pkts", {}).get("total", 0)),
            int(found.get("rx_pkts", {}).get("total", 0)),
        )

    def flood(self, seconds: float) -> Trial:
        """Send at the port's full rate; counts are of a window in the middle."""
        self._load(1e6)
        self._client.start(ports=[0], mult="100%", force=True)
        own = list(self._subject.pids())
        try:
            time.sleep(WARM_S)
            before, start = moment(own), (time.perf_counter(), *self._counts())
            time.sleep(seconds)
            end, after = (time.perf_counter(), *self._counts()), moment(own)
        finally:
            self._client.stop(ports=[0])
        passed, sent, arrived = (b - a for a, b in zip(start, end, strict=True))
        return Trial(0.0, int(sent), int(arrived), passed, usage=between(before, after))

    def trial(self, rate: float, seconds: float, stamp: bool = False) -> Trial:
        """Send at a rate for a time and wait for the last frame; stamp: also take times."""
        self._load(rate, stamp=stamp)
        return self._counted(rate, seconds, stamp)

    def burst(self, frames: int) -> Trial:
        """Send frames at full rate and wait for the last one."""
        line = float(self._client.get_port_info([0])[0]["speed"]) * 1e9
        most = line / 8 / (traffic.mean_size(self._case.traffic.size, self._path.family) + 20)
        self._load(most, burst=frames)
        return self._counted(most, -1, False)

    def _counted(self, rate: float, seconds: float, stamp: bool) -> Trial:
        own = list(self._subject.pids())
        before = moment(own)
        self._client.start(ports=[0], duration=seconds, force=True)
        self._client.wait_on_traffic(ports=[0], timeout=max(seconds, 0) + 60)
        time.sleep(SETTLE_S)
        sent, arrived = self._counts()
        after = moment(own)
        if not sent:
            raise LabError("the TRex server has sent nothing")
        times = self._times() if stamp else NONE
        passed = seconds if seconds > 0 else sent / rate
        left_out = max(0, round(rate * seconds) - sent) if seconds > 0 else 0
        return Trial(rate, sent, arrived, passed, left_out, times, between(before, after))

    def _times(self) -> Histogram:
        found = self._client.get_pgid_stats([TIMED])["latency"][TIMED]["latency"]
        if text := found.get("hdrh"):
            from hdrh.histogram import HdrHistogram

            whole = HdrHistogram.decode(text)
            pairs = [(one.value_iterated_to, one.count_added_in_this_iter_step)
                     for one in whole.get_recorded_iterator()]  # fmt: skip
            return Histogram.of_pairs(pairs)
        return Histogram.of_pairs(sorted((us * 1000, n) for us, n in found["histogram"].items()))


def _client(host: str, sync: int, events: int) -> tuple[Any, Any]:
    """Return a connected client and TRex's API. Raises LabError."""
    try:
        import lbr_trex_client  # noqa: F401  it makes `trex` importable
        from trex.stl import api
    except ImportError as error:
        raise LabError(f"driver trex: {error}: pip install lbr-trex-client") from error
    client = api.STLClient(server=host, sync_port=sync, async_port=events, verbose_level="error")
    try:
        client.connect()
        client.reset()
        if client.get_port_count() < 2:
            raise LabError(f"the TRex server {host} has one port: two are needed")
    except api.STLError as error:
        raise LabError(f"TRex server {host}: {error}") from error
    return client, api


@contextlib.contextmanager
def open_session(subject: Subject, case: Case, options: Mapping[str, str]) -> Iterator[Trex]:
    """Prepare a case; LabError for what TRex's streams cannot be, or a server that is not there."""
    if case.directions == 2 or case.traffic.order != "uniform":
        raise LabError("the driver trex sends in one direction, flows in turn: use frames")
    host, server = options.get("server", ""), None
    if not host:
        answer(subject, case)
        ends = (subject.client.namespace, subject.server.namespace)
        ports = [f"{DEVICE}@{end.name}" for end in ends]
        words = [sys.executable, "-m", "bench", "trex", *ports, "--cpu", str(GENERATOR_CPU)]
        words += ["--sync-port", str(SYNC), "--async-port", str(ASYNC)]
        server = subject.lab.process(words, "trex")
        eventually(lambda: _listens(server), "our TRex server", 20)
    try:
        client, api = _client(host or LOCAL, *((SYNC, ASYNC) if server else (4501, 4500)))
        try:
            yield Trex(subject, case, client, api)
        except api.STLError as error:
            raise LabError(f"TRex: {error}") from error
        finally:
            client.disconnect()
    finally:
        if server is not None:
            server.stop()


def _listens(server: Any) -> bool:
    if not server.alive:
        raise LabError(f"our TRex server has ended: {server.output()[-500:]}")
    return "ports " in server.output()
