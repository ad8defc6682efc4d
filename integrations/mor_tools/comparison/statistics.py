"""Spread over seeds, and whether a difference lies beyond it.

Runs of one seed read the text in the same order, so differences are taken seed by seed. A difference
counts if its 95 % confidence interval (Student's t over the seeds) excludes zero. With one seed there is
no spread, and nothing counts.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
    2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
    2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom."""
MOST_SEEDS = len(_STUDENT_T) + 1
NO_DIFFERENCE = "no difference beyond the spread"


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None with one seed."""
    values: tuple[float, ...]
    """The figure of each seed."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of one or more values."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, tuple(values))

    def shown(self, digits: int = 3) -> str:
        """`mean ± deviation`."""
        tail = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{tail}"


@dataclass(frozen=True)
class Difference:
    """How the losses of a model differ from those of another, over the seeds that both have."""

    mean: float
    """Loss minus the other's loss, in nats per token."""
    half_width: float | None
    """Half of the 95 % confidence interval; None with fewer than two seeds."""

    @classmethod
    def between(cls, losses: Sequence[float], others: Sequence[float]) -> "Difference":
        """The difference between losses of the same seeds, in the same order."""
        paired = [loss - other for loss, other in zip(losses, others, strict=True)]
        mean, number = statistics.fmean(paired), len(paired)
        if number < 2:
            return cls(mean, None)
        error = statistics.stdev(paired) / math.sqrt(number)
        return cls(mean, _STUDENT_T[number - 2] * error)

    @property
    def is_beyond_spread(self) -> bool:
        """Whether the confidence interval excludes zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width

    def verdict(self) -> str:
        """The difference in words."""
        if self.half_width is None:
            return f"{self.mean:+.3f} (one seed: no spread known)"
        interval = f"{self.mean:+.3f} ± {self.half_width:.3f}"
        if not self.is_beyond_spread:
            return f"{interval}: {NO_DIFFERENCE}"
        return f"{interval}: {'lower' if self.mean < 0 else 'higher'}"
