"""How much of the FLOPs that routing saves is saved in time, and which kernels keep the rest.

Plain arithmetic on times that were measured elsewhere, so that it can be tested by hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

BAR = 0.85
"""The share of the saved FLOPs that has to be saved in time. The best published one is 0.76 (arXiv
2507.10524: two recursions save 25 % of the FLOPs and 19 % of the training time)."""
LEAST_SAVED_FLOPS = 0.05
"""Below this saved share of the FLOPs, the noise of a time would decide the ratio."""


@dataclass(frozen=True)
class Saving:
    """What a routed model saves compared with a baseline."""

    time_ratio: float
    """Time of a step over the baseline's. Above 0."""
    flop_ratio: float
    """FLOPs of a step over the baseline's, in (0, 1)."""

    @property
    def realised(self) -> float | None:
        """Saved time ÷ saved FLOPs: 1 if time shrinks as FLOPs do, 0 if it does not shrink at all,
        negative if it grows. None if too few FLOPs are saved to tell."""
        saved_flops = 1.0 - self.flop_ratio
        if saved_flops < LEAST_SAVED_FLOPS:
            return None
        return (1.0 - self.time_ratio) / saved_flops

    @property
    def is_short(self) -> bool:
        """Whether it misses `BAR`, or saves so little that nothing is shown."""
        return self.realised is None or self.realised < BAR

    def __str__(self) -> str:
        realised = "none" if self.realised is None else f"{self.realised:.2f}"
        return f"{realised} (time {self.time_ratio:.3f}, FLOPs {self.flop_ratio:.3f})"


def time_ratio(rounds: Sequence[Mapping[str, float]], ours: str, baseline: str) -> float:
    """Median over rounds of the ratio of two times of the same round.

    A machine whose clock changes from round to round changes both times of a round alike.

    Args:
        rounds: seconds by the name of the model, for each round.
        ours: name of the model that is compared.
        baseline: name of the model that it is compared with.
    """
    return median(times[ours] / times[baseline] for times in rounds)


@dataclass(frozen=True)
class KernelExcess:
    """A kernel that takes longer than its share of the saved FLOPs allows."""

    name: str
    milliseconds: float
    """In a step of ours."""
    baseline_milliseconds: float
    """In a step of the baseline."""
    excess: float
    """Milliseconds above `flop_ratio` times the baseline's."""


def excesses(
    ours: Mapping[str, float], baseline: Mapping[str, float], flop_ratio: float, most: int = 8
) -> list[KernelExcess]:
    """The kernels that keep a model from saving as much time as FLOPs, the worst first.

    If every kernel took `flop_ratio` of its time in the baseline, the saved time would be the saved
    FLOPs. A kernel that only the routed model has, such as a gather of rows, is an excess as a whole.

    Args:
        ours: milliseconds of a step by the name of the kernel.
        baseline: the same for the baseline.
        flop_ratio: FLOPs of ours over the baseline's.
        most: number of kernels to return.
    """
    found = []
    for name, milliseconds in ours.items():
        before = baseline.get(name, 0.0)
        excess = milliseconds - flop_ratio * before
        if excess > 0:
            found.append(KernelExcess(name, milliseconds, before, excess))
    return sorted(found, key=lambda kernel: -kernel.excess)[:most]
