"""What the page says about runs that cost other FLOPs than planned, or are missing."""

from dataclasses import replace
from pathlib import Path

from mor_tools.comparison.plan import plan
from mor_tools.comparison.results import ModelResult, Point, RunResult
from mor_tools.comparison.tables import markdown, notes
from tests.mor_tools.comparison.test_plan import DENSE, LOOPED, write


def finished(model, share: float) -> ModelResult:
    """A run that spent this share of the planned FLOPs."""
    steps = model.settings.training.steps
    end = Point(steps, 5.0, 128 * steps, share * model.costs.flops(steps), 10.0)
    return ModelResult(model, (RunResult(1, 5.0, 5.0, 1234, None, (end,)),), None)


def test_only_a_deviation_from_the_planned_flops_is_told(tmp_path: Path):
    comparison = plan(write(tmp_path, dense=DENSE, looped=LOOPED), ["flops"], seeds=2)
    dense, looped = comparison.models
    # Three steps are far from the budget, and cost what three steps should.
    training = replace(looped.settings.training, steps=3, warmup_steps=0, decay_steps=1)
    short = replace(looped, settings=replace(looped.settings, training=training))
    found = [finished(dense, 1.0), finished(short, 0.99)]
    assert not any("spent" in note for note in notes(comparison, found))
    (told,) = (n for n in notes(comparison, [finished(looped, 1.05)]) if "spent" in n)
    assert told.startswith("looped spent 5.0% more than")
    assert "2 of 4 runs are finished." in notes(comparison, found)
    assert "| dense | 1,234 |" in markdown(found)
