"""The arithmetic of saved time and saved FLOPs, against numbers worked out by hand."""

import pytest
import torch

from tests.gpu.speed.kernel_profile import milliseconds_by_kernel, table_of_excesses
from tests.gpu.speed.realised_savings import savings_over_baselines
from tests.gpu.speed.savings import Saving, excesses, time_ratio


@pytest.mark.parametrize(
    ("time", "flops", "realised", "is_short"),
    [
        (0.81, 0.75, 0.76, True),  # the best published: 19 % of the time for 25 % of the FLOPs
        (0.65, 0.60, 0.875, False),  # 35 % for 40 %
        (0.70, 0.70, 1.0, False),
        (1.10, 0.80, -0.5, True),  # slower, though it computes less
    ],
)
def test_realised_savings_are_saved_time_over_saved_flops(
    time: float, flops: float, realised: float, is_short: bool
) -> None:
    saving = Saving(time, flops)
    assert saving.realised == pytest.approx(realised)
    assert saving.is_short is is_short


def test_a_model_that_saves_hardly_any_flops_shows_nothing() -> None:
    assert Saving(0.5, 0.96).realised is None
    assert Saving(0.5, 0.96).is_short
    assert str(Saving(0.5, 0.96)) == "none (time 0.500, FLOPs 0.960)"


def test_times_are_compared_within_a_round() -> None:
    rounds = [  # the clock halves after the first round, and a disturbance hits the last
        {"ours": 0.060, "unrouted": 0.100, "plain": 0.120},
        {"ours": 0.120, "unrouted": 0.200, "plain": 0.240},
        {"ours": 0.900, "unrouted": 0.200, "plain": 0.240},
    ]
    assert time_ratio(rounds, "ours", "unrouted") == pytest.approx(0.6)
    flops = {"ours": 30.0, "unrouted": 60.0, "plain": 50.0}
    savings = savings_over_baselines(rounds, flops, ["ours"])["ours"]
    assert savings["unrouted"].realised == pytest.approx(0.8)  # 0.4 / 0.5
    assert savings["plain"].realised == pytest.approx(1.25)  # 0.5 / 0.4


def test_kernels_that_keep_time_are_listed_the_worst_first() -> None:
    unrouted = {"product": 10.0, "norm": 2.0, "attention": 8.0}
    ours = {"product": 7.0, "norm": 1.0, "attention": 3.0, "gather": 1.5}
    found = excesses(ours, unrouted, flop_ratio=0.5)
    # 7 - 5, 1.5 - 0; the norm takes what it may, and attention less.
    assert [(k.name, k.excess) for k in found] == [("product", 2.0), ("gather", 1.5)]
    assert excesses(ours, unrouted, flop_ratio=0.5, most=1) == found[:1]
    assert table_of_excesses(found).splitlines()[1].split() == [
        "7.000",
        "10.000",
        "2.000",
        "product",
    ]


def test_a_profile_has_the_time_of_every_kernel() -> None:
    values = torch.randn(200, 200)
    times = milliseconds_by_kernel(lambda: torch.relu(values @ values))
    names = [name for name in times if "mm" in name or "relu" in name]
    assert names, times
    assert all(times[name] > 0 for name in names)
