"""The sweep draws every pair that can run and notices what differs; a few of its cases run every day."""

from dataclasses import replace

import pytest
import torch

from tests.distributed.pool import WorkerPool
from tests.sweep import factors, run
from tests.sweep.draw import described, draw, pairs_of
from tests.sweep.train import Outcome, refusal

SMALL = {"colour": ("red", "green", "blue"), "size": ("small", "large"), "form": ("round", "flat")}
NEEDED = {
    "taught exit gate": {"recipe": "loss after every loop"},
    "random loops, the last train": {"recipe": "stabilised"},
}
"""What some values need beside the usual ones."""
USUAL = {name: values[0] for name, values in factors.FACTORS.items()}


def no_large_blue(case):
    return "no large blue" if (case["colour"], case["size"]) == ("blue", "large") else None


def test_every_pair_that_can_run_is_drawn():
    drawn = draw(SMALL, no_large_blue, seed=0)
    pairs = {pair for case in drawn.cases for pair in pairs_of(case)}
    assert drawn.num_pairs == 3 * 2 + 3 * 2 + 2 * 2
    assert len(pairs) == drawn.num_pairs - 1
    (refused,) = drawn.refused
    assert refused == (("colour", "blue"), ("size", "large"))
    assert drawn.refused[refused]["form"] == "round"  # the usual one
    assert len(drawn.cases) < 3 * 2 * 2
    assert draw(SMALL, no_large_blue, seed=0).cases == drawn.cases


def test_a_case_is_described_by_what_is_unusual():
    case = {"colour": "blue", "size": "small", "form": "flat"}
    assert described(case, {"colour": "red", "size": "small", "form": "round"}) == "blue; flat"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layout": "EP"}, "has no effect without experts"),
        ({"layout": "steps as stages", "recipe": "sequence"}, "repeat one by one"),
        ({"recipe": "own MLP", "layers": "experts"}, "mixture of experts"),
        ({"recipe": "own MLP", "recomputed": "MLP"}, "recompute_modules"),
        ({"layers": "GELU with biases", "recomputed": "MLP"}, "never ends"),
        ({"layout": "CP × PP", "recipe": "cycle"}, "exceeds the 1 parts"),
    ],
)
def test_a_case_that_the_library_refuses_is_not_run(changes, reason):
    given = refusal(USUAL | changes)
    assert given is not None
    assert reason in given


@pytest.mark.parametrize("name", factors.FACTORS)
def test_every_value_of_a_factor_can_run(name):
    for value in factors.FACTORS[name]:
        layers = [value] if name == "layers" else ["dense", "experts", "latent attention"]
        recipe = NEEDED.get(value, {})
        cases = [USUAL | recipe | {"layers": kind} | {name: value} for kind in layers]
        assert any(refusal(case) is None for case in cases), value


def test_a_difference_is_noticed():
    tensors = {"weight": torch.ones(3)}
    expected = Outcome([1.0, 2.0], [3.0, 4.0], tensors, tensors)
    assert list(run.differences(expected, expected)) == []
    off = {"weight": torch.tensor([1.0, 1.0, 1.0001])}
    for changed, told in (
        (replace(expected, losses=[1.0, 2.001]), "the loss of step 2"),
        (replace(expected, losses=[float("nan"), 2.0]), "the loss of step 1"),
        (replace(expected, norms=[3.1, 4.0]), "norm of step 1"),
        (replace(expected, gradients=off), "the gradient of weight is off by 1.0e-04"),
        (replace(expected, parameters=off), "after the last step, weight is off"),
        (replace(expected, parameters={}), "weight exists on one rank only"),
    ):
        (difference,) = run.differences(changed, expected)
        assert told in difference


DAILY = [
    # Experts outside the recursion, too, leave out padding in every layout.
    {
        "layers": "sigmoid experts with a bias",
        "sequences": "documents and padding",
        "layout": "TP+SP × PP",
    },
    # What a recursion returns is sent to the next stage.
    pytest.param({"recipe": "history", "layout": "PP=3"}, marks=pytest.mark.full),
]


@pytest.mark.parametrize("changes", DAILY, ids=lambda changes: changes["layout"])
def test_a_layout_takes_the_steps_of_one_rank(pool: WorkerPool, changes) -> None:
    (result,) = run.Sweep(pool).run([(0, USUAL | changes)])
    assert not result.failure
