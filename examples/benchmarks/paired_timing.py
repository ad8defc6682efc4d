"""How much longer one piece of work takes than another, on a machine that others use too.

Both are timed in rounds of plain, ours, ours, plain. A drift of the machine's speed, which is a straight
line over the short time of a round, adds the same to both and cancels in the round's ratio. What does
not cancel is noise: the median over rounds ignores a few disturbed ones, and its bootstrap interval
tells how far it can be trusted. Rounds are added until that interval is narrow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy

CONFIDENCE = 0.95
RESAMPLES = 2000
LEAST_ROUNDS = 10
"""The bootstrap interval of fewer rounds is too narrow."""
LEAST_SHARE = 0.9
"""Share of the processor below which timings say more about the machine's other work."""


@dataclass(frozen=True)
class Timing:
    """One run of a piece of work."""

    seconds: float
    """What is compared."""
    share: float | None = None
    """Processor time over the time that passed; None where the work is not the processor's."""


@dataclass
class Rounds:
    """Timings of two pieces of work, round by round."""

    ratios: list[float] = field(default_factory=list)
    """Ours over plain, of each round."""
    shares: list[float] = field(default_factory=list)
    """Of the processor, of each run."""

    def add(self, first: Timing, ours: Timing, ours_again: Timing, last: Timing) -> None:
        """Add a round of plain, ours, ours, plain."""
        self.ratios.append((ours.seconds + ours_again.seconds) / (first.seconds + last.seconds))
        runs = (first, ours, ours_again, last)
        self.shares += [timing.share for timing in runs if timing.share is not None]

    def estimate(self) -> "Estimate":
        """What the rounds so far say; there must be at least one."""
        share = float(numpy.median(self.shares)) if self.shares else None
        return estimate(self.ratios, share)


@dataclass(frozen=True)
class Estimate:
    """The ratio of two pieces of work, and how well it is known."""

    ratio: float
    """Median over the rounds, ours over plain."""
    low: float
    """Lower end of the median's bootstrap interval."""
    high: float
    """Its upper end."""
    rounds: int
    """Number of rounds."""
    share: float | None
    """Share of the processor in the median run; None where the work is not the processor's."""

    @property
    def half_width(self) -> float:
        """Of the interval, relative to the ratio."""
        return (self.high - self.low) / (2 * self.ratio)

    @property
    def verdict(self) -> str:
        """Whether ours is faster, as far as the rounds can tell."""
        if self.share is not None and self.share < LEAST_SHARE:
            return f"none: {self.share:.0%} of the processor"
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "no difference seen"


def estimate(ratios: Sequence[float], share: float | None = None) -> Estimate:
    """The median of the ratios of rounds, at least one, and its bootstrap interval.

    Args:
        share: of the processor in the median run.
    """
    own = numpy.array(ratios)
    generator = numpy.random.default_rng(0)  # the same rounds always say the same
    picks = generator.integers(len(own), size=(RESAMPLES, len(own)))
    medians = numpy.median(own[picks], axis=1)
    low, high = numpy.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(numpy.median(own)), float(low), float(high), len(own), share)


def measure(
    plain: Callable[[], Timing],
    ours: Callable[[], Timing],
    half_width: float = 0.015,
    most_rounds: int = 100,
) -> Estimate:
    """Run rounds until the interval is as narrow as `half_width`, or there are `most_rounds`."""
    rounds = Rounds()
    while True:
        rounds.add(plain(), ours(), ours(), plain())
        estimate = rounds.estimate()
        is_narrow = estimate.rounds >= LEAST_ROUNDS and estimate.half_width <= half_width
        if is_narrow or estimate.rounds >= most_rounds:
            return estimate
