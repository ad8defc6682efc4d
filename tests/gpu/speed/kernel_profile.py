"""Time of the kernels of a step, by torch's profiler."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from tests.gpu.speed.savings import KernelExcess

_NAME_WIDTH = 72


def milliseconds_by_kernel(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of each kernel in one run of `step`; on a CPU, of each operator by itself."""
    on_gpu = torch.cuda.is_available()
    # Only one of the two: with both, a kernel's time would count for its operator as well.
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    times = {
        average.key: average.self_device_time_total if on_gpu else average.self_cpu_time_total
        for average in profiler.key_averages()
    }  # microseconds
    return {name: time / 1000 for name, time in times.items() if time > 0}


def table_of_excesses(kernels: list[KernelExcess]) -> str:
    """One row per kernel, in plain text."""
    rows = [f"{'ms':>9} {'baseline':>9} {'excess':>9}  kernel"]
    rows += [
        f"{k.milliseconds:9.3f} {k.baseline_milliseconds:9.3f} {k.excess:9.3f}  {k.name[:_NAME_WIDTH]}"
        for k in kernels
    ]
    return "\n".join(rows)
