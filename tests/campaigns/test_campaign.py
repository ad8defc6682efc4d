"""A sample of the campaign, and that it would notice what it is there to notice."""

import random
from pathlib import Path

import pytest

from tests.campaigns.campaign import LONGEST_REASON, run_case, run_cases, table
from tests.campaigns.kinds import KINDS, SELDOM


@pytest.mark.parametrize("cases", [150, pytest.param(3000, marks=pytest.mark.full)])
def test_hostile_cases_are_correct_or_refused_with_a_reason(cases: int) -> None:
    outcomes = list(run_cases(KINDS, cases, seed=cases, seldom=SELDOM))
    failed = [f"{o.name} of seed {o.seed}: {o.reason}" for o in outcomes if o.ending == "failed"]
    assert not failed, "\n".join([table(outcomes), *failed])
    # Where every case ended alike, what is tried would be too wild or too tame to find a fault.
    number = {
        ending: sum(o.ending == ending for o in outcomes) for ending in ("correct", "refused")
    }
    assert min(number.values()) > cases / 8, number
    if cases > 1000:  # a sample is too small to have both of every kind
        endings = {kind: {o.ending for o in outcomes if o.kind == kind} for kind in KINDS}
        assert all(endings[kind] == {"correct", "refused"} for kind in KINDS if kind not in SELDOM)


def crashes(source: random.Random, folder: Path) -> str | None:
    raise KeyError("a traceback")


@pytest.mark.parametrize(
    ("case", "ending"),
    [
        (lambda source, folder: None, "correct"),
        (lambda source, folder: "steps=0 must be at least 1.", "refused"),
        (lambda source, folder: "", "failed"),
        (lambda source, folder: "KeyError", "failed"),
        (lambda source, folder: "too long " * LONGEST_REASON, "failed"),
        (crashes, "failed"),
    ],
)
def test_how_a_case_ended_is_told(case, ending: str) -> None:
    assert run_case("kind", case, seed=0, number=0).ending == ending


def test_a_case_is_the_same_whenever_it_runs() -> None:
    drawn = []

    def case(source: random.Random, folder: Path) -> str | None:
        assert not list(folder.iterdir())
        drawn.append(source.random())
        return None

    kinds = {"one": case, "seldom": case}
    names = [outcome.name for outcome in run_cases(kinds, 7, seed=3, seldom=("seldom",))]
    assert names == ["one:0", "seldom:0", "one:1", "one:2", "one:3", "one:4", "seldom:1"]
    run_case("one", case, seed=3, number=2)
    assert drawn[-1] == drawn[3]
    assert len(set(drawn)) == 7
