"""Where the time of our engine's ticks goes, by operation."""

from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

from benchmarks.serving.ours import HAS_GPU, Load


@dataclass(frozen=True)
class Operation:
    """An operation of PyTorch, over all its calls."""

    name: str
    calls: float
    """For each tick."""
    milliseconds: float
    """For each tick, without the operations that it calls."""
    share: float
    """Of all operations' time."""


def operations(load: Load, ticks: int = 8, most: int = 20) -> list[Operation]:
    """The operations that take the most time, most first.

    The profiler adds about a microsecond to each, so compare them with one another, not with a clock.
    """
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * HAS_GPU]
    with profile(activities=activities) as run:
        for _ in range(ticks):
            load.feed.tick()
    found = run.key_averages()
    times = {f.key: f.self_device_time_total if HAS_GPU else f.self_cpu_time_total for f in found}
    whole = sum(times.values())
    made = [
        Operation(f.key, f.count / ticks, times[f.key] / ticks / 1000, times[f.key] / whole)
        for f in found
    ]
    return sorted(made, key=lambda operation: -operation.milliseconds)[:most]
