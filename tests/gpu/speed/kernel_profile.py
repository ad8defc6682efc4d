"""Time of the kernels of a step, by torch's profiler."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.gpu.speed.savings import KernelExcess

_NAME_WIDTH = 72


def milliseconds_by_kernel(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of each kernel in one run of `step`; of each operator on a CPU, its callees excluded."""
    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if not on_gpu:
            times[event.name] += event.self_cpu_time_total / 1000
        elif event.device_type is DeviceType.CUDA:
            times[event.name] += event.self_device_time_total / 1000
    return dict(times)


def table_of_excesses(kernels: list[KernelExcess]) -> str:
    """One row per kernel, in plain text."""
    rows = [f"{'ms':>9} {'baseline':>9} {'excess':>9}  kernel"]
    rows += [
        f"{k.milliseconds:9.3f} {k.baseline_milliseconds:9.3f} {k.excess:9.3f}  {k.name[:_NAME_WIDTH]}"
        for k in kernels
    ]
    return "\n".join(rows)
