"""DNS through the dataplane beside DNS through the kernel: rate, and latency at half of it.

Rule: dnsperf asks the same server for the same names in turns; both numbers of a row are of one
machine and one hour, and the spread is shown.

Theory. Two pods of one node; the server is dnsmasq with fixed answers, so it is the same for all
and fast. The rate is dnsperf's at full load. Latency is taken at one rate for all, half of the
slowest full rate, query by query (dnsperf -v), since its summary has no percentiles; what the
dataplane adds is the difference of the p99s. Penstock is measured plain, and with a policy by names
for the client, where every query is judged and every answer teaches.
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


class PenstockByName(Penstock):
    """The same with a policy by names for the client."""

    name = "penstock, toFQDNs"

    def settle(self) -> None:
        """Apply the policy; wait until it refuses another name."""
        super().settle()
        self.cluster.apply("names", POLICY)


SUBJECTS: tuple[type[Subject], ...] = (Kernel, Penstock, PenstockByName)


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
    return subject.client.namespace.run(*words, timeout=seconds + 60)


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


@click.command()
@click.option("--runs", default=5, show_default=True, help="Turns of each subject.")
@click.option("--seconds", default=3, show_default=True, help="Of each turn.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where results go too.")
def main(runs: int, seconds: int, path: Path | None) -> None:
    """Measure, print medians with their spread, and what is said of the kernel."""
    found = measure(runs, seconds)
    base = found[Kernel.name]
    click.echo(
        f"{'subject':20} {'queries/s':>10} {'of kernel':>9} {'lost':>6} {'p50':>8} {'p99':>18}"
    )
    for name, one in found.items():
        share = median(one["per_s"]) / median(base["per_s"])
        spread = f"{median(one['p99_us']):.0f} ({min(one['p99_us']):.0f}-{max(one['p99_us']):.0f})"
        click.echo(
            f"{name:20} {median(one['per_s']):10.0f} {share:9.2f} {sum(one['lost']):6.0f} "
            f"{median(one['p50_us']):5.0f} us {spread:>15} us"
        )
    if path is not None:
        path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
