"""The benchmark's statistics find a known ratio in made-up timings of a machine that is not quiet."""

import math
import random
from collections.abc import Callable

import pytest

from benchmarks.paired_timing import LEAST_ROUNDS, Rounds, Timing, measure


class Machine:
    """Does work in made-up time."""

    def __init__(self, speed: Callable[[float], float], noise: float, seed: int) -> None:
        self.now, self.runs = 0.0, 0
        self._speed, self._noise, self._random = speed, noise, random.Random(seed)

    def work(self, amount: float, share: float | None = None) -> Callable[[], Timing]:
        """Something that takes `amount` seconds at speed 1 without noise."""

        def run() -> Timing:
            self.runs += 1
            disturbance = math.exp(self._random.gauss(0, self._noise))
            seconds = amount * disturbance / self._speed(self.now)
            self.now += seconds
            return Timing(seconds, share)

        return run


@pytest.mark.parametrize("ratio", [0.65, 0.97, 1.3])
def test_a_known_ratio_is_found_under_noise(ratio):
    """The interval is of 95 %: of fifteen measurements, a few may miss."""
    found = []
    for seed in range(15):
        machine = Machine(lambda now: 1.0, noise=0.05, seed=seed)
        found.append(measure(machine.work(1.0), machine.work(ratio)))
    assert all(e.ratio == pytest.approx(ratio, rel=0.04) for e in found)
    assert all(e.half_width <= 0.015 or e.rounds == 100 for e in found)
    assert sum(e.low <= ratio <= e.high for e in found) >= 12


def test_a_machine_that_slows_down_half_way_changes_nothing():
    def speed(now: float) -> float:
        return 1.0 if now < 45.0 else 0.4  # in the middle of a round

    machine = Machine(speed, noise=0.02, seed=1)
    estimate = measure(machine.work(1.0), machine.work(0.8), half_width=0.0, most_rounds=30)
    assert machine.now > 100.0
    assert estimate.ratio == pytest.approx(0.8, rel=0.015)
    assert estimate.verdict == "faster"


def test_a_steady_drift_cancels_within_a_round():
    slower = iter([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7])
    rounds = Rounds()
    for _ in range(2):
        rounds.add(*(Timing(next(slower)) for _ in range(4)))
    assert rounds.ratios == pytest.approx([1.0, 1.0])


def test_rounds_end_when_the_interval_is_narrow_or_there_are_enough():
    quiet = Machine(lambda now: 1.0, noise=0.0, seed=0)
    assert measure(quiet.work(1.0), quiet.work(0.5)).rounds == LEAST_ROUNDS
    assert quiet.runs == 4 * LEAST_ROUNDS
    loud = Machine(lambda now: 1.0, noise=0.5, seed=0)
    estimate = measure(loud.work(1.0), loud.work(1.0), most_rounds=25)
    assert (estimate.rounds, estimate.verdict) == (25, "no difference seen")
    assert estimate.half_width > 0.015


@pytest.mark.parametrize(
    ("ratio", "share", "verdict"),
    [
        (0.7, 0.95, "faster"),
        (1.2, 0.95, "slower"),
        (1.0, 0.95, "no difference seen"),
        (0.7, 0.6, "none: 60% of the processor"),
        (0.7, None, "faster"),
    ],
)
def test_a_machine_that_is_busy_with_other_work_gives_no_verdict(ratio, share, verdict):
    machine = Machine(lambda now: 1.0, noise=0.01, seed=3)
    estimate = measure(machine.work(1.0, share), machine.work(ratio, share), half_width=0.005)
    assert estimate.share == share
    assert estimate.verdict == verdict
