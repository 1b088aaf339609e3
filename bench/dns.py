"""DNS through the dataplane beside DNS through the kernel: rate, and latency at half of it.

Rule: dnsperf asks the same server for the same names in short turns, one subject after the other;
what is compared are turns that stand side by side, and the spread is shown.

Theory. Two pods of one node; the server is dnsmasq with fixed answers, so it is the same for all
and fast. All may run on all cores: a daemon on a core of its own would wait there while others are
free. The rate is dnsperf's at full load. Latency is taken at one rate for all, half of the slowest
full rate, query by query (dnsperf -v), since its summary has no percentiles. On a machine with
other work a p99 is that work's, and in a turn of one second that of its first messages, which open
flows: so turns are longer, and besides the median of all there is the quietest turn of each
subject, which is the nearest to a machine of one's own. Penstock is measured plain, and with a
policy by names for the client, where every query is judged and every answer teaches.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import click
import numpy as np

from bench.lab import Lab, LabError, Process, eventually
from bench.scenario import Place
from bench.subjects.base import Subject
from bench.subjects.kernel import Kernel
from bench.subjects.ours import Penstock

ZONE, ANSWER = "bench.test", "192.0.2.53"
NAMES = 1000
CONNECTIONS = 20
_LINE = re.compile(r"^> \w+ \S+ \S+ ([0-9.]+)$", re.M)
POLICY = {
    "apiVersion": "cilium.io/v2",
    "kind": "CiliumNetworkPolicy",
    "metadata": {"name": "names", "namespace": "default"},
    "spec": {
        "endpointSelector": {"matchLabels": {"app": "client"}},
        "egress": [
            {"toFQDNs": [{"matchPattern": f"*.{ZONE}"}]},
            {
                "toEndpoints": [{}],
                "toPorts": [
                    {
                        "ports": [{"port": "53", "protocol": "UDP"}],
                        "rules": {"dns": [{"matchPattern": f"*.{ZONE}"}]},
                    }
                ],
            },
        ],
    },
}


class PenstockAnywhere(Penstock):
    """Penstock, whose daemon may run on all cores."""

    anywhere = True


class PenstockByName(PenstockAnywhere):
    """The same with a policy by names for the client."""

    name = "penstock, toFQDNs"

    def settle(self) -> None:
        """Apply the policy; wait until it refuses another name."""
        super().settle()
        self.cluster.apply("names", POLICY)


SUBJECTS: tuple[type[Subject], ...] = (Kernel, PenstockAnywhere, PenstockByName)


def _serve(subject: Subject) -> Process:
    server = subject.server.namespace.spawn(
        "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null",
        f"--address=/{ZONE}/{ANSWER}", "--pid-file=", "--user=root", "--log-facility=-",
    )  # fmt: skip
    eventually(lambda: _answers(subject), "dnsmasq", 30)
    return server


def _answers(subject: Subject) -> bool:
    with contextlib.suppress(LabError):
        words = ("+short", "+time=1", "+tries=1", f"name0.{ZONE}")
        return ANSWER in subject.client.namespace.run("dig", f"@{subject.target}", *words)
    return False


def _dnsperf(subject: Subject, seconds: int, rate: int = 0) -> str:
    names = subject.lab.folder / "names"
    names.write_text("".join(f"name{n}.{ZONE} A\n" for n in range(NAMES)))
    words = ["dnsperf", "-s", subject.target, "-d", str(names), "-c", str(CONNECTIONS)]
    words += ["-l", str(seconds), *(["-Q", str(rate), "-v"] if rate else [])]
    # Into a file: who reads 40 000 lines a second from a pipe takes a fifth of a core from both.
    return subject.client.namespace.spawn(*words).wait(seconds + 60)


def _field(text: str, name: str) -> float:
    found = re.search(rf"{name}:\s+([0-9.]+)", text)
    if found is None:
        raise LabError(f"dnsperf says no {name}: {text[-500:]}")
    return float(found[1])


@contextlib.contextmanager
def _standing(chosen: tuple[type[Subject], ...]) -> Iterator[list[Subject]]:
    """All subjects, each in a laboratory of its own, with their servers."""
    with contextlib.ExitStack() as stack:
        subjects = []
        for kind in chosen:
            subject = kind(stack.enter_context(Lab()), Place("same", 4))
            _serve(subject)
            subjects.append(subject)
        yield subjects


def measure(runs: int, seconds: int) -> dict[str, dict[str, list[float]]]:
    """Return for each subject the rates, losses and percentiles of all runs."""
    found: dict[str, dict[str, list[float]]] = {}
    with _standing(SUBJECTS) as subjects:
        for subject in subjects:
            found[subject.name] = {name: [] for name in ("per_s", "lost", "p50_us", "p99_us")}
            _dnsperf(subject, 1)
        for _ in range(runs):
            for subject in subjects:
                text = _dnsperf(subject, seconds)
                found[subject.name]["per_s"].append(_field(text, "Queries per second"))
                found[subject.name]["lost"].append(_field(text, "Queries lost"))
        rate = int(min(median(one["per_s"]) for one in found.values()) / 2)
        for _ in range(runs):
            for subject in subjects:
                times = np.array(_LINE.findall(_dnsperf(subject, seconds, rate)), float) * 1e6
                if not len(times):
                    raise LabError("dnsperf -v has told no latency")
                found[subject.name]["p50_us"].append(float(np.percentile(times, 50)))
                found[subject.name]["p99_us"].append(float(np.percentile(times, 99)))
    return found


def table(found: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """Yield the lines of a report: medians of what stands side by side, and the quietest turns."""
    base = found[Kernel.name]
    yield (
        f"{'':20} {'queries/s':>10} {'of kernel':>9} {'lost':>5} | {'p50 us':>7} {'p99 us':>7} "
        f"{'added p50':>9} {'p99':>6} | least of all: {'p50':>6} {'p99':>6} {'added':>6} {'p99':>6}"
    )
    for name, one in found.items():
        share = median(mine / its for mine, its in zip(one["per_s"], base["per_s"], strict=True))
        row = f"{name:20} {median(one['per_s']):10.0f} {share:9.2f} {sum(one['lost']):5.0f} |"
        row += f" {median(one['p50_us']):7.0f} {median(one['p99_us']):7.0f}"
        for column, wide in (("p50_us", 9), ("p99_us", 6)):
            pairs = zip(one[column], base[column], strict=True)
            row += f" {median(mine - its for mine, its in pairs):{wide}.0f}"
        least = [min(one[column]) for column in ("p50_us", "p99_us")]
        added = [min(one[column]) - min(base[column]) for column in ("p50_us", "p99_us")]
        yield f"{row} |{'':15}{least[0]:6.0f} {least[1]:6.0f} {added[0]:6.0f} {added[1]:6.0f}"


@click.command()
@click.option("--runs", default=15, show_default=True, help="Turns of each subject.")
@click.option("--seconds", default=2, show_default=True, help="Of each turn.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where results go too.")
def main(runs: int, seconds: int, path: Path | None) -> None:
    """Measure, print medians, what was added to the kernel's, and the quietest turns."""
    found = measure(runs, seconds)
    for line in table(found):
        click.echo(line)
    if path is not None:
        path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
