"""Check: a routed recursion saves in time what it saves in FLOPs.

Each KV policy is compared with the same recursion without routing and with the plain stack of equal
depth. All of them are built once and timed in rounds that go through all of them and back, so that a
clock that drifts touches each alike. Runs on a rank, and on a CPU in a rehearsal.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from mor_layers import DecoderConfig, FixedDepth, RecursionConfig, RouterConfig
from mor_layers.recursion import KVPolicy
from tests.distributed import megatron_setup as setup
from tests.gpu.speed.contender import PLAIN, Contender, Execution
from tests.gpu.speed.kernel_profile import milliseconds_by_kernel, table_of_excesses
from tests.gpu.speed.savings import Saving, excesses, time_ratio
from tests.gpu.verdict import SHORTFALL

Step = Callable[[], None]

NUM_RECURSIONS = 3
BASELINES = {
    "unrouted": RecursionConfig(NUM_RECURSIONS, sharing="cycle", router=FixedDepth()),
    "plain": PLAIN,
}


def saves_time(
    router: RouterConfig,
    policies: Sequence[KVPolicy],
    execution: Execution,
    hidden_size: int = 2048,
    length: int = 4096,
    micro_batch: int = 2,
    rounds: int = 5,
    has_bar: bool = True,
) -> dict[str, Any]:
    """Saved time ÷ saved FLOPs of a router with each policy, and the peak memory.

    The model has two shared layers that run three times and no others, so that a whole recursion is
    compiled in seconds. A quarter of a usual depth has a quarter of a usual vocabulary: logits take
    the same share of a step as in a model of 24 layers.

    Args:
        router: of the recursion.
        policies: KV policies, each a model of its own.
        execution: eager or compiled; with static shapes, every model is also captured and replayed
            as one CUDA graph, and has a second set of figures.
        hidden_size: h.
        length: s.
        micro_batch: sequences in a step.
        rounds: timings of every model, each of some steps there and some back.
        has_bar: whether a model that misses the bar falls short, and is profiled.
    """
    setup.initialize()
    model_parallel_cuda_manual_seed(
        123, use_cudagraphable_rng=torch.cuda.is_available(), force_reset_rng=True
    )
    heads = max(2, hidden_size // 128)
    decoder = DecoderConfig(
        vocab_size=4 * hidden_size,
        hidden_size=hidden_size,
        ffn_hidden_size=11 * hidden_size // 4,
        num_unrolled_layers=2 * NUM_RECURSIONS,
        num_heads=heads,
    )
    ids = torch.randint(decoder.vocab_size, (micro_batch, length + 1), device=setup.device())
    routed = {
        policy: RecursionConfig(NUM_RECURSIONS, sharing="cycle", router=router, kv_policy=policy)
        for policy in policies
    }
    models = {
        name: Contender(decoder, recursion, ids, execution)
        for name, recursion in (BASELINES | routed).items()
    }
    flops = {name: model.flops() for name, model in models.items()}
    ways: dict[str, dict[str, Step]] = {
        "launched": {name: model.step for name, model in models.items()}
    }
    if execution.is_static:
        ways["replayed"] = {name: model.replayed() for name, model in models.items()}
    figures: dict[str, Any] = {}
    reports = []
    for way, steps in ways.items():
        times = [_round(steps) for _ in range(rounds)]
        savings = savings_over_baselines(times, flops, policies)
        for name, model in models.items():
            row = {"ms": 1000 * min(t[name] for t in times), "peak GiB": model.peak_gib}
            for baseline, saving in savings.get(name, {}).items():
                row[f"saved time ÷ saved FLOPs of {baseline}"] = saving.realised
                row[f"time/{baseline}"] = saving.time_ratio
                row[f"FLOPs/{baseline}"] = saving.flop_ratio
            figures[f"{name}, {way}"] = row
        if has_bar:
            reports += _shortfalls(way, steps, savings, flops)
    return figures | ({SHORTFALL: "\n".join(reports)} if reports else {})


def savings_over_baselines(
    rounds: Sequence[Mapping[str, float]], flops: Mapping[str, float], names: Sequence[str]
) -> dict[str, dict[str, Saving]]:
    """What every model of `names` saves over every baseline, by name and by baseline.

    Args:
        rounds: seconds by name, for each round.
        flops: of a step, by name.
        names: the routed models.
    """
    return {
        name: {
            baseline: Saving(time_ratio(rounds, name, baseline), flops[name] / flops[baseline])
            for baseline in BASELINES
        }
        for name in names
    }


def _round(steps: Mapping[str, Step], repeats: int = 3) -> dict[str, float]:
    """Seconds of a step of each model: the mean of some in order and some in reverse order."""
    seconds = dict.fromkeys(steps, 0.0)
    for name in [*steps, *reversed(steps)]:
        _finish()
        begin = time.perf_counter()
        for _ in range(repeats):
            steps[name]()
        _finish()
        seconds[name] += (time.perf_counter() - begin) / (2 * repeats)
    return seconds


def _shortfalls(
    way: str,
    steps: Mapping[str, Step],
    savings: Mapping[str, Mapping[str, Saving]],
    flops: Mapping[str, float],
) -> list[str]:
    """For every model that misses the bar over a baseline, the kernels that take too long."""
    reports, unrouted = [], None
    for name, over in savings.items():
        missed = ", ".join(f"{saving} of {b}" for b, saving in over.items() if saving.is_short)
        if not missed:
            continue
        unrouted = unrouted or milliseconds_by_kernel(steps["unrouted"])
        ours = milliseconds_by_kernel(steps[name])
        kernels = excesses(ours, unrouted, flops[name] / flops["unrouted"])
        reports.append(f"{name}, {way}: {missed}\n{table_of_excesses(kernels)}")
    return reports


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
