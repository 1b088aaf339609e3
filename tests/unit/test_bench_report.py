"""What is said about files of results: changes, claims, tables, the page."""

import io
import re

import pytest
from rich.console import Console

from bench import claims, compare, page, report, results
from bench.results import Key, Results
from bench.run import Options, Run
from bench.scenario import choose

PLACE, CASE = "same node, IPv4", "packets: 64 B, 1,024 flows"
MACHINE = {"cpu": "one", "cores": 2, "kernel": "6.18"}


def made(noise: float = 0.01, **numbers: list[float]) -> dict:
    """A file of results of the scenario `same`: turns by subject (an underscore is a blank)."""
    run = Run(choose(["same"], False), Options(), Console(file=io.StringIO()))
    found: Results = run.results
    for subject, turns in numbers.items():
        for turn, number in enumerate(turns):
            for quantity, value in (("pps", number), ("busy_ns", 1000 / number)):
                name = subject.replace("_", " ").replace("PLUS", "+")
                found.add(Key("same", PLACE, CASE, name, quantity), turn, value)
    found.noise = [{"foreign_share": noise, "yardstick_us": 100.0}]
    return found.plain({"machine": MACHINE, "versions": {}, "run": {"turns": 5, "command": "c"}})


STEADY = [1.0, 1.01, 0.99, 1.0, 1.02]


def words(before: dict, after: dict) -> tuple[str, int]:
    text = io.StringIO()
    worse = compare.show(before, after, Console(file=text, width=200))
    return text.getvalue(), worse


def verdict(before: list[float], after: list[float], quantity: str = "pps") -> str:
    return compare.change(Key("s", "p", "c", "penstock", quantity), before, after).verdict


def test_a_change_is_one_only_when_its_interval_says_so():
    assert verdict(STEADY, [2 * n for n in STEADY]) == compare.BETTER
    assert verdict(STEADY, [0.5 * n for n in STEADY]) == compare.WORSE
    assert verdict(STEADY, STEADY[::-1]) == compare.SAME
    wild = [0.5, 1.0, 2.0, 0.7, 1.4]
    assert verdict(wild, wild[::-1]) == compare.NOISY
    assert verdict([1.0], [3.0]) == compare.NOISY, "one turn says nothing of its spread"


def test_less_time_is_better():
    assert verdict(STEADY, [0.5 * n for n in STEADY], "p99_us") == compare.BETTER


def test_what_happened_to_a_peer_too_is_not_ours():
    before = made(penstock=STEADY, linux=STEADY)
    after = made(penstock=[n / 2 for n in STEADY], linux=[n / 2 for n in STEADY])
    plain, beside = (compare.changes(before, after, peer) for peer in ("", "linux"))
    ours = [one for one in plain if one.key.subject == "penstock" and one.key.quantity == "pps"]
    assert [one.verdict for one in ours] == [compare.WORSE]
    ours = [one for one in beside if one.key.subject == "penstock" and one.key.quantity == "pps"]
    assert [one.verdict for one in ours] == [compare.SAME]


def test_other_machines_and_noise_are_named():
    before, after = made(penstock=STEADY), made(0.5, penstock=STEADY)
    after["machine"] = {**MACHINE, "cpu": "another"}
    text, worse = words(before, after)
    assert worse == 0
    assert "not the same: cpu: one -> another" in text
    assert "after, noisy: other processes had 50% of the machine" in text
    assert "before, noisy" not in text


def test_the_exit_status_counts_what_is_worse_for_certain():
    assert words(made(penstock=STEADY), made(penstock=[n / 2 for n in STEADY]))[1] == 2
    assert words(made(penstock=STEADY), made(penstock=STEADY))[1] == 0


# --- claims ---------------------------------------------------------------------------------------


def test_every_claim_names_a_scenario_that_is_there_and_has_what_it_speaks_of():
    from bench.scenario import cases, load_all
    from bench.subjects import NAMES

    known = load_all()
    for claim in claims.load():
        assert claim.ours in NAMES
        assert claim.beside in ("", *NAMES)
        assert bool(claim.beside) != bool(claim.base), "beside a peer, or beside another case"
        if not claim.scenario:
            continue
        found = cases(known[claim.scenario])
        for part in (claim.case, claim.base):
            assert any(claims._holds(case.label, part) for case in found), claim
        assert any(claim.place in str(case.place) for case in found), claim


def test_claims_are_checked_by_their_worst_case_turn_by_turn():
    whole = made(penstock=[4.0, 8.0, 4.4], xdp_redirect=[5.0, 10.0, 5.0])
    claim = next(one for one in claims.load() if one.beside == "xdp redirect")
    seen = claims.check(claim, whole)
    assert seen
    assert seen.ratio == pytest.approx(0.8)
    assert seen.interval == (pytest.approx(0.8), pytest.approx(0.88))
    assert seen.reached
    assert claims.check(claim, made(penstock=STEADY)) is None
    text = claims.markdown(whole)
    assert "| same node, 64 B, 1 k flows | 4.40 Mpps | xdp redirect | 0.80 | 0.80..0.88 |" in text
    assert "not measured" in text
    poor = claims.markdown(made(penstock=[1.0], xdp_redirect=[10.0]))
    assert "0.10 (**not reached**) | one turn" in poor


# --- tables and the page --------------------------------------------------------------------------


def test_markdown_for_the_readme():
    text = report.markdown(made(0.5, penstock=[2.0] * 3, linux=[1.0] * 3))
    assert f"| {PLACE}; {CASE} | 2.00 Mpps | linux 1.00 (**2.00**) | `same` |" in text
    assert "- Noisy: other processes had 50%" in text
    assert "`c`" in text


def test_the_page_needs_nothing_else(tmp_path):
    whole = made(penstock=STEADY, linux=[n / 2 for n in STEADY])
    files = page.write(whole, tmp_path / "page.html")
    text = files[0].read_text()
    assert not re.search(r"(src|href)=['\"]?(http|/|\./)", text)
    assert text.count("data:image/png;base64,") == len(files) - 1 == 1, (
        "no claim speaks of linux here"
    )
    assert files[1].read_bytes().startswith(b"\x89PNG")
    for part in ("2.00", "not measured", "Repeat with <code>c</code>"):
        assert part in text


def test_old_files_are_refused_with_a_word(tmp_path):
    path = tmp_path / "old.json"
    results.dump(path, {"schema": 1})
    with pytest.raises(results.LabError, match="not results of this version"):
        results.read(path)
