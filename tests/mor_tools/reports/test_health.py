"""What goes wrong in a run shows in its rows, and only there."""

import pytest

from mor_tools.reports.health import (
    NO_GRADIENT,
    ROWS_IN_TURN,
    Health,
    Plan,
    PlannedSteps,
    findings,
)
from mor_tools.reports.rows import Routing, Row

STEPS = PlannedSteps(3, (1.0, 2 / 3, 1 / 3))
PLANNED = Plan(sequences=8, recursions=[STEPS], warmup_steps=10)
FREE = Plan(sequences=8, recursions=[PlannedSteps(3)])
BOTH = Plan(8, [PlannedSteps(2, (1.0, 1.0)), STEPS, PlannedSteps(2)])
GOOD = [1.0, 0.66, 0.33]


def routed(
    shares: list[float], dead: float = 0.04, gradient: bool = True, count: int = 5
) -> list[Row]:
    """Rows from step 20 on whose routing is always the same."""
    metrics = {} if gradient else {NO_GRADIENT: 1.0}
    return [Row(20 + i, 4.0, 1e-3, 1.0, 1.0, Routing(shares, dead, metrics)) for i in range(count)]


def losses(*values: float) -> list[Row]:
    return [Row(step, value, 3e-3, 1.5) for step, value in enumerate(values, start=1)]


def subjects(rows: list[Row], plan: Plan = PLANNED) -> list[str]:
    return [finding.subject for finding in findings(rows, plan)]


def test_a_sound_run_has_no_findings():
    falling = losses(*(7.0 - 0.01 * i + (0.3 if i % 2 else 0.0) for i in range(300)))
    for plan in (PLANNED, FREE):
        assert findings(falling + routed(GOOD), plan) == []


@pytest.mark.parametrize(
    ("shares", "plan", "expected"),
    [
        ([1.0, 0.66, 0.001], PLANNED, ["depth 3"]),
        ([1.0, 1.0, 1.0], PLANNED, ["depth 2", "depth 3"]),
        # every token was meant to run all
        ([1.0, 1.0, 1.0], Plan(8, [PlannedSteps(3, (1.0, 1.0, 1.0))]), []),
        ([1.0, 1.0, 1.0], FREE, ["depth"]),
        ([1.0, 0.004, 0.002], FREE, ["depth"]),
        ([1.0, 0.9, 0.02], FREE, []),
        ([1.0, 1.0, *GOOD, 1.0, 0.4], BOTH, []),
        ([1.0, 1.0, 1.0, 0.66, 0.001, 1.0, 0.4], BOTH, ["depth 5"]),
        ([1.0, 1.0, *GOOD, 1.0, 1.0], BOTH, ["depth"]),
    ],
)
def test_a_depth_collapses_where_it_should_not(shares, plan, expected):
    assert subjects(routed(shares, dead=0.0), plan) == expected


def test_the_warm_up_is_no_collapse():
    rows = [Row(s, 4.0, 1e-3, 1.0, 1.0, Routing([1.0] * 3, 0.0, {})) for s in range(2, 11)]
    assert subjects(rows) == []
    assert subjects(rows, Plan(8, [STEPS])) == ["depth 2", "depth 3"]


def test_a_router_without_gradient_is_told_how_to_learn():
    (finding,) = findings(routed(GOOD, gradient=False), PLANNED)
    assert finding.subject == "scorer"
    assert "recursion.router.combine=weighted" in finding.message
    assert str(finding).startswith(f"warning: step {20 + ROWS_IN_TURN - 1}: ")


def test_positions_die_only_beyond_chance():
    assert subjects(routed(GOOD, dead=0.5)) == ["dead"]
    # One sequence in a batch leaves two thirds of the positions out whatever the router does.
    assert subjects(routed(GOOD, dead=0.67), Plan(1, [STEPS])) == []


def test_a_fault_must_last_and_is_told_once():
    bad, good = routed(GOOD, dead=0.9), routed(GOOD)
    assert subjects([*bad[:2], good[0], *bad[:2]]) == []
    health = Health(PLANNED)
    told = [len(health.add(row)) for row in [*bad, good[0], *bad]]
    assert told == [0, 0, 1] + [0] * 8


def test_a_loss_that_rises_is_told_with_its_remedy():
    rising = losses(*[7.0 - 0.02 * i for i in range(100)], *[6.5] * 30)
    (finding,) = findings(rising, PLANNED)
    assert finding.subject == "loss"
    assert 100 < finding.step < 130
    assert "half of training.learning_rate" in finding.message
    spike = losses(*[5.0] * 40, 9.0, *[5.0] * 40)  # one bad batch is none
    assert subjects(spike) == []
