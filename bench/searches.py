"""Searches over a session: throughput without and with little loss, loss curve, bursts, latency.

Rule: a search sees a driver's Session and nothing else of what is measured.

Theory. Throughput is searched by MLRsearch (draft-ietf-bmwg-mlrsearch; the package is CSIT's own),
both loss ratios in one search: NDR allows no loss, PDR 0.5 %. CSIT's goal (21 s of 1 s trials,
width 0.5 %) is for quiet machines; `quick` trials are shorter and the goal is 3 % wide, which is
what a shared machine can tell anyway. A generator that was itself kept from sending says so
(`left_out`): a few frames less are a slightly lower load, more than UNSENT_MOST make the trial a
bad one. The loss curve goes down from the most that was offered (RFC 2544 26.3); a burst is the
longest that passes at full rate without loss (RFC 9004), the median of some searches.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.drivers import Session, Trial
from bench.lab import LabError

PDR_LOSS = 0.005
UNSENT_MOST = 0.02
LOAD_LEAST = 5_000.0
CURVE = (1.5, 1.25, 1.1, 1.0, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)
BURST_LEAST, BURST_MOST = 16, 1 << 20
BURST_WIDTH = 1.1
SHARES = (10, 50, 90)


@dataclass(frozen=True)
class Goal:
    """How exactly, and for how long at most."""

    trial_s: float = 0.3
    sum_s: float = 0.9
    width: float = 0.03
    most_s: float = 40.0


QUICK = Goal()
CSIT = Goal(1.0, 21.0, 0.005, 1200.0)


@dataclass(frozen=True)
class Throughput:
    """Frames a second at no loss and at 0.5 %; 0: not even at the least load."""

    ndr: float
    pdr: float
    trials: int
    seconds: float


def throughput(session: Session, most: float, goal: Goal = QUICK) -> Throughput:
    """Search below `most` frames a second."""
    from MLRsearch import Config, MultipleLossRatioSearch, SearchGoal

    started = time.monotonic()
    measurer, config = _measurer(session), Config()
    config.max_load = max(most, 2 * LOAD_LEAST)
    config.min_load = LOAD_LEAST
    config.search_duration_max = goal.most_s
    config.warmup_duration = 0.0
    config.goals = [
        SearchGoal(
            loss_ratio=ratio,
            relative_width=goal.width,
            initial_trial_duration=goal.trial_s / 2,
            final_trial_duration=goal.trial_s,
            duration_sum=goal.sum_s,
            fail_fast=False,
        )
        for ratio in (0.0, PDR_LOSS)
    ]
    try:
        found = MultipleLossRatioSearch(config=config).search(measurer, debug=lambda _: None)
    except RuntimeError as error:
        raise LabError(f"MLRsearch after {measurer.trials} trials: {error}") from error
    rates = []
    for one in config.goals:
        result = found[one].conditional_throughput
        rates.append(float(result) if result is not None else 0.0)
    return Throughput(rates[0], rates[1], measurer.trials, time.monotonic() - started)


def _measurer(session: Session):
    from MLRsearch import AbstractMeasurer, MeasurementResult

    class Measurer(AbstractMeasurer):
        """Trials of a session, as MLRsearch wants them."""

        def __init__(self) -> None:
            self.trials = 0

        def measure(self, intended_duration: float, intended_load: float) -> MeasurementResult:
            """Send and count."""
            self.trials += 1
            return MeasurementResult(
                intended_duration=intended_duration,
                intended_load=intended_load,
                **counts(session.trial(intended_load, intended_duration)),
            )

    return Measurer()


def counts(trial: Trial) -> dict[str, int]:
    """Return what MLRsearch is told of a trial."""
    found = {"offered_count": trial.sent, "forwarding_count": min(trial.arrived, trial.sent)}
    intended = trial.sent + trial.left_out
    if trial.left_out > UNSENT_MOST * intended:
        found["intended_count"] = intended
    return found


def loss_curve(session: Session, base: float, seconds: float) -> list[tuple[float, float]]:
    """Return (offered, share lost) at shares of a rate, the highest first, until two lose none."""
    found: list[tuple[float, float]] = []
    for share in CURVE:
        trial = session.trial(base * share, seconds)
        found.append((trial.offered, trial.loss))
        if len(found) > 1 and not any(loss for _, loss in found[-2:]):
            break
    return found


def longest_burst(session: Session, searches: int = 3) -> int:
    """Return the longest burst without loss; the median of some searches."""
    return round(statistics.median(_burst(lambda n: session.burst(n)) for _ in range(searches)))


def _burst(send: Callable[[int], Trial]) -> int:
    """Double until something is lost, then halve the interval in ratio."""
    good, bad = 0, BURST_LEAST
    while bad <= BURST_MOST and send(bad).loss == 0:
        good, bad = bad, bad * 2
    if good == 0 or bad > BURST_MOST:
        return good
    while bad / good > BURST_WIDTH:
        middle = round((good * bad) ** 0.5)
        if send(middle).loss == 0:
            good = middle
        else:
            bad = middle
    return good


def latencies(session: Session, base: float, seconds: float) -> dict[int, Trial]:
    """Return stamped trials at 10, 50 and 90 % of a rate."""
    return {share: session.trial(base * share / 100, seconds, stamp=True) for share in SHARES}
