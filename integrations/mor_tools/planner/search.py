"""Searches all parallel layouts for a number of devices: which are legal, and which are fastest."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import gcd, isqrt
from typing import get_args

from mor_megatron.parallel import (
    BATCH_RULES,
    LAYOUT_RULES,
    Arrangement,
    PipelineLayout,
    broken_rule,
)
from mor_tools.planner.evaluate import evaluate
from mor_tools.planner.hardware import Hardware
from mor_tools.planner.layouts import Layout, Plan, Workload
from mor_tools.planner.memory import RECOMPUTE, Recompute

USABLE = 0.9
"""Share of a device's memory that a plan may use. Libraries and fragmentation take the rest."""

NEIGHBOURS = 64
"""How many of the closest numbers of devices `nearest` tries."""


def refusal(work: Workload, layout: Layout) -> str | None:
    """Why mor_megatron or Megatron-Core would reject a layout, or None if it is legal."""
    rule = broken_rule(_arrangement(work, layout), (*LAYOUT_RULES, *BATCH_RULES))
    return None if rule is None else rule.summary


def _arrangement(work: Workload, layout: Layout) -> Arrangement:
    model, moe = work.model, work.model.moe
    return Arrangement(
        num_unrolled_layers=model.num_unrolled_layers,
        recursion=model.recursion,
        num_heads=model.num_heads,
        num_kv_heads=model.kv_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        expert_ffn_hidden_size=(moe.ffn_hidden_size or model.ffn_hidden_size) if moe else None,
        num_experts=moe.num_experts if moe else None,
        sequence_length=work.sequence_length,
        tensor=layout.tensor,
        sequence_parallel=layout.sequence_parallel,
        pipeline=layout.pipeline,
        pipeline_layout=layout.pipeline_layout,
        context=layout.context,
        expert=layout.expert,
        devices=layout.num_devices,
        global_batch_size=work.global_batch_size,
        micro_batch_size=layout.micro_batch_size,
    )


@dataclass(frozen=True)
class Search:
    """The result of a search over all layouts."""

    fitting: tuple[Plan, ...]
    """Legal layouts that fit into memory, fastest first."""
    too_large: tuple[Plan, ...]
    """Legal layouts that do not fit into memory, smallest first."""
    refused: Counter[str]
    """Number of layouts that are not legal, by reason."""


def search(
    work: Workload, devices: int, hardware: Hardware, micro_batch_sizes: tuple[int, ...],
    recompute: tuple[Recompute, ...], efficiency: float = 0.5,
) -> Search:  # fmt: skip
    """Evaluate every layout on `devices` devices. Layouts with TP use sequence parallelism.

    Raises:
        ValueError: `devices` or `efficiency` is out of range.
    """
    if devices < 1:
        raise ValueError(f"devices={devices} must be at least 1.")
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency={efficiency} must be in (0, 1].")
    plans, refused = [], Counter[str]()
    for layout in _layouts(work, devices, micro_batch_sizes, recompute):
        reason = refusal(work, layout)
        if reason is not None:
            refused[reason] += 1
            continue
        plans.append(evaluate(work, layout, hardware, efficiency))
    room = hardware.memory_gib * 2**30 * USABLE
    fitting = sorted((p for p in plans if p.memory.total <= room), key=lambda p: p.seconds)
    rest = sorted((p for p in plans if p.memory.total > room), key=lambda p: p.memory.total)
    return Search(tuple(fitting), tuple(rest), refused)


def nearest(work: Workload, devices: int, hardware: Hardware) -> Plan | None:
    """The fastest layout that fits, on the number of devices closest to `devices`.

    It tries the closest numbers of devices that can have a legal layout, and 2 to 1024 times as many
    devices as asked for, with any recomputation and micro-batches of 1 or 2 sequences. None if nothing
    fits on any of them.
    """
    counts = sorted(_possible_counts(work), key=lambda n: (abs(n - devices), n))
    doubled = [devices * 2**n for n in range(1, 11)]
    for count in (*counts[:NEIGHBOURS], *(n for n in doubled if n in counts[NEIGHBOURS:])):
        # Micro-batches of one sequence need the least memory. If these do not fit, nothing does.
        if _fits(work, count, hardware):
            return search(work, count, hardware, (1, 2), RECOMPUTE).fitting[0]
    return None


def _fits(work: Workload, devices: int, hardware: Hardware) -> bool:
    room = hardware.memory_gib * 2**30 * USABLE
    layouts = _layouts(work, devices, (1,), ("full", "none"))
    return any(
        refusal(work, layout) is None and evaluate(work, layout, hardware).memory.total <= room
        for layout in layouts
    )


def _possible_counts(work: Workload) -> set[int]:
    """A superset of the numbers of devices that have a legal layout."""
    model, moe = work.model, work.model.moe
    widths = gcd(model.num_heads, model.kv_heads, model.ffn_hidden_size)
    if moe is not None:
        widths = gcd(widths, moe.ffn_hidden_size or model.ffn_hidden_size)
    # The size of each axis divides what it splits. Only pipeline stages may be uneven.
    tensor = divisors(widths, widths)
    context = divisors(work.sequence_length, work.sequence_length // 2) or (1,)
    pipeline = [
        size
        for size in range(1, model.num_unrolled_layers + 1)
        if any(
            broken_rule(_arrangement(work, Layout(1, size, kind)), LAYOUT_RULES) is None
            for kind in get_args(PipelineLayout)
        )
    ]
    data = divisors(work.global_batch_size, work.global_batch_size)
    counts = {1}
    for sizes in (tensor, context, pipeline, data):
        counts = {count * size for count, size in product(counts, sizes)}
    return counts


def _layouts(
    work: Workload,
    devices: int,
    micro_batch_sizes: tuple[int, ...],
    recompute: tuple[Recompute, ...],
) -> Iterator[Layout]:
    experts = work.model.moe.num_experts if work.model.moe else 1
    for t in divisors(devices, work.model.num_heads):
        for p in divisors(devices // t, work.model.num_unrolled_layers):
            for c in divisors(devices // t // p, max(1, work.sequence_length // 2)):
                data = devices // (t * p * c)
                for e in divisors(t * c * data, experts):
                    for kind in get_args(PipelineLayout)[: 1 + (p > 1)]:
                        for size in micro_batch_sizes:
                            for how in recompute:
                                yield Layout(t, p, kind, c, e, data, size, how, t > 1)


@cache
def divisors(number: int, most: int) -> tuple[int, ...]:
    """Divisors of a number up to `most`, in order."""
    small = [d for d in range(1, min(isqrt(number), most) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small if number // d <= most)}))
