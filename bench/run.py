"""A run: subjects of a place are built, then take turns in every case, then the place is left.

Rule: subjects take turns within each case; a peer that is not there is skipped with a word.

Theory. Cases that share a place share its subjects, so what is costly to build is built once. Every
turn measures every case with every subject, beginning with another subject each time, so that a
slow minute slows all of them and nobody always follows the same neighbour. The counters of Penstock
are read at a quiet moment after each measurement and balanced since the last such moment. Labs
clean up after themselves, also when this process is killed (lab.py); a signal ends the run and
keeps what has been found.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import balance, machine
from bench.lab import Lab, LabError
from bench.measure import Found, How, Memo, measure, prepare
from bench.results import Key, Results
from bench.scenario import TOPOLOGIES, Case, Place, Scenario, cases
from bench.subjects import SUBJECTS, Subject
from bench.subjects.ours import Penstock
from dataplane.tables.errors import TableError
from xdp.errors import XdpError

LINE_MOST = 300
FAILURES = (LabError, XdpError, TableError, OSError)
"""What a subject may come to; others are mistakes of ours."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    runs: int = 5
    quick: bool = False  # one case a list, the subjects that matter most
    how: How = field(default_factory=How)
    subjects: Sequence[str] = ()


def by_place(scenarios: Sequence[Scenario], quick: bool = False) -> dict[Place, list[Case]]:
    """Return the cases of all scenarios, those of one place together."""
    found: dict[Place, list[Case]] = {}
    for scenario in scenarios:
        for case in cases(scenario, quick):
            found.setdefault(case.place, []).append(case)
    return found


class Run:
    """One run; `results` is good at any time."""

    def __init__(self, scenarios: Sequence[Scenario], options: Options, console: Console) -> None:
        """scenarios: by name what is measured."""
        self.results = Results()
        self._scenarios = {one.name: one for one in scenarios}
        self._quiet: dict[int, list[balance.Snapshot]] = {}
        self._options, self._console = options, console
        for one in scenarios:
            self.results.scenarios[one.name] = {
                "title": one.title,
                "csit": one.csit,
                "topology": TOPOLOGIES[one.topology],
                "curve": one.curve,
            }

    def go(self) -> None:
        """Measure everything."""
        for place, found in by_place(list(self._scenarios.values()), self._options.quick).items():
            with ExitStack() as stack:
                made = self._build(stack, place, found)
                self._turns(made, place, found)
            self._quiet.clear()

    # --- building ---------------------------------------------------------------------------------

    def _wanted(self, kind: type[Subject], case: Case) -> bool:
        named, asked = self._scenarios[case.scenario].subjects, self._options.subjects
        return (
            case.measure in kind.measures
            and (not named or kind.name in named)
            and (kind.name in asked if asked else kind.quick or not self._options.quick)
        )

    def _build(self, stack: ExitStack, place: Place, found: list[Case]) -> list[Subject]:
        """Make every subject of a place, each in a lab of its own."""
        made = []
        for kind in SUBJECTS:
            if not any(self._wanted(kind, case) for case in found):
                continue
            if refusal := kind.refuses(place):
                if refusal.strip():
                    self._skip(f"{kind.name}, {place}: {refusal}")
                continue
            self._console.print(f"building {kind.name}, {place}", style="dim", highlight=False)
            try:
                made.append(self._make(stack, kind, place))
            except FAILURES as error:
                self._skip(f"{kind.name}, {place}: {_one_line(error)}")
            else:
                self.results.remarks[kind.name] = kind.remark
        return made

    def _make(self, stack: ExitStack, kind: type[Subject], place: Place) -> Subject:
        with ExitStack() as own:
            subject = kind(own.enter_context(Lab()), place)
            prepare(subject)
            stack.push(own.pop_all())
        return subject

    # --- turns ------------------------------------------------------------------------------------

    def _turns(self, made: list[Subject], place: Place, found: list[Case]) -> None:
        columns = (TextColumn("{task.description:<72.72}"), BarColumn(20), MofNCompleteColumn())
        pairs = [(case, one) for case in found for one in made if self._wanted(type(one), case)]
        total = self._options.runs * len(pairs)
        with Progress(*columns, TimeElapsedColumn(), console=self._console) as progress:
            task = progress.add_task(str(place), total=total)

            def tell(case: Case, subject: Subject) -> None:
                progress.update(task, description=f"{place}: {case.label}, {subject.name}")
                progress.advance(task)

            for turn in range(self._options.runs):
                self._turn(turn, made, found, tell)

    def _turn(
        self,
        turn: int,
        made: list[Subject],
        found: list[Case],
        tell: Callable[[Case, Subject], None],
    ) -> None:
        memo: Memo = {}
        first = turn % max(1, len(made))
        for case in found:
            for subject in made[first:] + made[:first]:
                if self._wanted(type(subject), case):
                    tell(case, subject)
                    self._measure(turn, subject, case, memo)

    def _measure(self, turn: int, subject: Subject, case: Case, memo: Memo) -> None:
        stick = machine.yardstick()
        try:
            before = self._quiet.get(id(subject)) or self._snapshots(subject)
            found = measure(subject, case, self._options.how, memo)
            self._keep(turn, subject, case, found, stick)
            after = self._quiet[id(subject)] = self._snapshots(subject)
        except FAILURES as error:
            where = f"turn {turn + 1}, {case.scenario}, {case.place}, {case.label}, {subject.name}"
            self._skip(f"{where}: {_one_line(error)}")
        else:
            self._balance(turn, subject, case, balance.check(before, after))

    def _snapshots(self, subject: Subject) -> list[balance.Snapshot]:
        if not isinstance(subject, Penstock):
            return []
        return balance.quiet(subject.snapshots, subject.has_flow_table)

    # --- keeping ----------------------------------------------------------------------------------

    def _keep(self, turn: int, subject: Subject, case: Case, found: Found, stick: float) -> None:
        place, results = str(case.place), self.results
        where = {
            "scenario": case.scenario,
            "place": place,
            "case": case.label,
            "subject": subject.name,
            "turn": turn,
        }
        for quantity, number in found.numbers.items():
            key = Key(case.scenario, place, case.label, subject.name, quantity)
            results.add(key, turn, number)
        noise: dict[str, Any] = {**where, "yardstick_us": stick}
        if found.usage:
            noise["steal_share"] = found.usage.steal_share
            noise["foreign_share"] = found.usage.foreign_share
        results.noise.append(noise)
        if found.curve:
            results.curves.append({**where, "points": found.curve})
        for name, histogram in found.histograms.items():
            text = histogram.encode()
            results.histograms.append({**where, "of": name, "hdr": text})

    def _balance(
        self, turn: int, subject: Subject, case: Case, found: list[balance.Balance]
    ) -> None:
        for node, one in enumerate(found, 1):
            self.results.balances.append(
                {
                    "scenario": case.scenario,
                    "place": str(case.place),
                    "case": case.label,
                    "subject": subject.name,
                    "turn": turn,
                    "node": node,
                    **one.plain(),
                }
            )
            if not one.exact:
                self._console.print(
                    f"counters do not agree: {case.label}, {subject.name}: {one}", style="red"
                )

    def _skip(self, line: str) -> None:
        self.results.skipped.append(line)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LINE_MOST else f"{text[:60]} .. {text[-LINE_MOST:]}"


def stamp() -> str:
    """Return a name for a file of results: the time, UTC."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime())
