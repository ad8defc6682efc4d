"""Every parallel layout of so many devices: which are legal, which fit, which is fastest."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from mor_tools.planner.evaluate import evaluate
from mor_tools.planner.hardware import Hardware
from mor_tools.planner.layouts import Layout, Plan, Workload
from mor_tools.planner.memory import Recompute
from mor_tools.planner.pipeline import PipelineLayout

USABLE = 0.9
"""Share of a device's memory that a plan may fill; libraries and fragments have the rest."""


def refusal(work: Workload, layout: Layout) -> str | None:
    """Why the plug or Megatron-Core would refuse a layout; None if neither does."""
    model, s, t, c = work.model, work.sequence_length, layout.tensor, layout.context
    schedule, recursion, moe = model.schedule, model.recursion, model.moe
    widths = [model.num_heads, model.kv_heads, model.ffn_hidden_size]
    widths += [moe.ffn_hidden_size or model.ffn_hidden_size] if moe else []
    is_spread = layout.pipeline_layout == "steps_as_stages"
    turns = math.lcm(2 * c, c * (t if layout.sequence_parallel else 1))
    batch = layout.data * layout.micro_batch_size
    blocks = 1 if schedule.is_cyclic else schedule.block_size
    rules = (
        (any(width % t for width in widths), "tensor: heads or widths do not divide"),
        (layout.sequence_parallel and s % t != 0, "tensor: the sequence does not divide"),
        (c > 1 and s % turns != 0, "context: the sequence does not divide"),
        (c > 1 and is_spread, "context: not with steps as stages"),
        (layout.expert > 1 and moe is None, "expert: no experts"),
        (moe is not None and moe.num_experts % layout.expert != 0, "expert: experts do not divide"),
        (t * c * layout.data % layout.expert != 0, "expert: ranks of a stage do not divide"),
        (moe is not None and t > 1 and not layout.sequence_parallel, "expert: TP needs SP"),
        (work.global_batch_size % batch != 0, "batch: does not divide by replicas × micro-batch"),
        (is_spread and (recursion is None or not schedule.is_cyclic
                        or recursion.num_recursions < 2), "pipeline: nothing goes round"),
        (is_spread and recursion is not None and recursion.kv_policy == "exit_state",
         "pipeline: exit_state stays in one stage"),
        (is_spread and schedule.block_size % layout.pipeline != 0,
         "pipeline: the block does not spread evenly"),
        (is_spread and work.global_batch_size // batch % layout.pipeline != 0,
         "pipeline: micro-batches do not go round in groups"),
        (not is_spread and recursion is None
         and model.num_unrolled_layers % layout.pipeline != 0, "pipeline: layers do not divide"),
        (not is_spread and recursion is not None
         and layout.pipeline > schedule.prelude + blocks + schedule.coda,
         "pipeline: more stages than parts"),
    )  # fmt: skip
    return next((reason for is_wrong, reason in rules if is_wrong), None)


@dataclass(frozen=True)
class Search:
    """What became of every layout."""

    fitting: tuple[Plan, ...]
    """Best first."""
    too_large: tuple[Plan, ...]
    """Legal, but beyond a device's memory; smallest first."""
    refused: Counter[str]
    """Layouts by why they are not legal."""


def search(
    work: Workload, devices: int, hardware: Hardware, micro_batch_sizes: tuple[int, ...],
    recompute: tuple[Recompute, ...], efficiency: float = 0.5,
) -> Search:  # fmt: skip
    """Every layout of so many devices, with sequence parallelism wherever there is TP."""
    if devices < 1:
        raise ValueError(f"{devices} devices: there must be at least 1.")
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency={efficiency} must lie in (0, 1].")
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


def _layouts(
    work: Workload,
    devices: int,
    micro_batch_sizes: tuple[int, ...],
    recompute: tuple[Recompute, ...],
) -> Iterator[Layout]:
    experts = work.model.moe.num_experts if work.model.moe else 1
    for t in _divisors(devices, work.model.num_heads):
        for p in _divisors(devices // t, work.model.num_unrolled_layers):
            for c in _divisors(devices // t // p, work.sequence_length // 2):
                data = devices // (t * p * c)
                for e in _divisors(t * c * data, experts):
                    for kind in get_args(PipelineLayout)[: 1 + (p > 1)]:
                        for size in micro_batch_sizes:
                            for how in recompute:
                                yield Layout(t, p, kind, c, e, data, size, how, t > 1)


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]
