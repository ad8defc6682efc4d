"""FLOPs, traffic and memory of one rank, for one chunk of its pipeline stage and one microbatch."""

from collections import Counter
from dataclasses import dataclass, replace

from mor_layers.costs.counting import StepAccount
from mor_tools.planner.layouts import Layout, Workload
from mor_tools.planner.memory import (
    Kept,
    kept_by_layer,
    kept_by_output,
    kept_by_routing,
    kept_input,
)
from mor_tools.planner.stages import Part
from mor_tools.planner.traffic import (
    Rows,
    Spread,
    Traffic,
    end_traffic,
    routing_traffic,
    run_traffic,
)


@dataclass(frozen=True)
class Way:
    """One pass of a chunk, forward or backward."""

    flops: float
    sent: Traffic


@dataclass(frozen=True)
class Chunk:
    """The cost of a chunk for one microbatch."""

    forward: Way
    backward: Way
    kept: float
    """Bytes that are kept for the backward pass."""
    recomputed: float
    """Additional bytes that recomputation needs during the backward pass."""


def count_chunk(
    work: Workload, layout: Layout, parts: list[Part], at_start: bool, at_end: bool
) -> Chunk:
    """Count the cost of the parts that a chunk runs.

    Args:
        at_start: whether this is the first chunk of the model, which has the embedding.
        at_end: whether this is the last chunk, which computes the loss.
    """
    b, hop = layout.micro_batch_size, hop_bytes(work, layout)
    # With a loss after every loop, what leaves a recursion in one stage are the states of all loops.
    is_spread = layout.pipeline_layout == "steps_as_stages"
    loops = 1 if is_spread else work.shape.num_losses
    entering = hop * (loops if parts[0].stack.name == "coda" else 1)
    leaving = hop * (loops if parts[-1].index >= work.last_block else 1)
    kept, recomputed = _kept(work, layout, parts, at_end)
    ways = []
    for flops, sent, has_neighbour, moved in zip(
        _flops(work, layout, parts, at_end),
        _sent(work, layout, parts, at_start, at_end),
        (not at_end, not at_start),  # states are sent to the next chunk, gradients to the previous
        (leaving, entering),
        strict=True,
    ):
        total = Counter({key: value * b for key, value in sent.items()})
        if layout.pipeline > 1 and has_neighbour:
            total["pipeline", "send"] = moved
        ways.append(Way(flops * b, total))
    arrived = entering if layout.pipeline > 1 and not at_start else 0
    return Chunk(ways[0], ways[1], kept * b + arrived, recomputed * b)


def hop_bytes(work: Workload, layout: Layout) -> float:
    """Bytes that a rank sends to the next stage per microbatch."""
    ranks = (layout.tensor if layout.sequence_parallel else 1) * layout.context
    rows = carried_rows(work, layout) * layout.micro_batch_size / ranks
    return rows * work.model.hidden_size * work.itemsize


def carried_rows(work: Workload, layout: Layout) -> int:
    """Rows of hidden size that are sent between two stages per sequence, over all of their ranks."""
    if layout.pipeline_layout == "one_stage":
        return work.sequence_length
    ranks = (layout.tensor if layout.sequence_parallel else 1) * layout.context
    carried = replace(work.carried, ranks=ranks, context=layout.context)
    return carried.carried_length(work.sequence_length)


def _step(work: Workload, stack: int, step: int) -> StepAccount:
    """The cost of one step of a whole stack."""
    return work.cost.steps[work.first_run[stack] + step]


def _readings(work: Workload, part: Part) -> int:
    """How many losses a part runs for: those of all loops, if it comes after the recursion."""
    return work.shape.num_losses if part.stack.name == "coda" else 1


def _flops(work: Workload, layout: Layout, parts: list[Part], at_end: bool) -> tuple[float, float]:
    """FLOPs per sequence on one rank: forward, and backward including recomputation."""
    ahead, behind = 0.0, 0.0
    for part in parts:
        run = _step(work, part.index, part.step)
        share = part.layers / part.stack.num_layers
        flops = [
            (way.total - way.depth_router) * share + way.depth_router * part.first
            for way in (run.forward, run.backward)
        ]
        again = {"none": 0.0, "selective": run.forward.attention * share, "full": flops[0]}
        ahead += flops[0]
        behind += flops[1] + again[layout.recompute] * run.trained
    if at_end:
        ahead += work.cost.forward.output + work.cost.further_losses[0].total
        behind += work.cost.backward.output + work.cost.further_losses[1].total
    shards = layout.tensor * layout.context
    return ahead / shards, behind / shards


def _kept(work: Workload, layout: Layout, parts: list[Part], at_end: bool) -> tuple[float, float]:
    """Bytes per sequence on one rank: kept, and needed temporarily by recomputation."""
    shape, length = work.shape, work.sequence_length / layout.context
    how = Kept(work.itemsize, layout.tensor, layout.sequence_parallel)
    entries: Counter[int] = Counter()  # bytes by stack, because a stack is recomputed as a whole
    for part in parts:
        tokens = _step(work, part.index, part.step).tokens / layout.context
        tokens *= _readings(work, part)
        before = length
        if part.step:
            before = _step(work, part.index, part.step - 1).tokens / layout.context
        bytes_kept = part.layers * kept_by_layer(
            shape, part.stack, tokens, how
        ) + part.first * kept_by_routing(shape, part.stack, part.step, before, tokens, how)
        entries[part.index] += _step(work, part.index, part.step).trained * bytes_kept
    kept, for_a_moment = float(sum(entries.values())), 0.0
    if layout.recompute == "full":
        kept = len(entries) * kept_input(shape, length, how)
        for_a_moment = max(entries.values(), default=0.0)
    if at_end:
        kept += kept_by_output(shape, length * shape.num_losses, how)
    return kept, for_a_moment


def _sent(
    work: Workload, layout: Layout, parts: list[Part], at_start: bool, at_end: bool
) -> tuple[Traffic, Traffic]:
    """Bytes per sequence that one rank sends within its stage: forward, and backward."""
    shape, s = work.shape, work.sequence_length
    spread = Spread(
        layout.tensor, layout.sequence_parallel, layout.context, layout.expert, work.itemsize
    )
    traffic = end_traffic(shape, at_start, at_end, s, spread)
    for part in parts:
        run, again = _step(work, part.index, part.step), _readings(work, part)
        projected = again * run.kv_numbers / (shape.kept_size * part.stack.num_layers)
        rows = Rows(again * run.tokens, projected, again * run.seen)
        sources = [run_traffic(shape, part.stack, part.layers, rows, spread)]
        if part.step == 0 and part.stack.num_recursions > 1:
            steps = range(part.stack.num_recursions)
            tokens = tuple(_step(work, part.index, step).tokens for step in steps)
            head = work.model.rotary_size
            sources.append(routing_traffic(shape, part.stack, tokens, s, spread, head))
        for ahead, behind in sources:
            traffic[0].update(ahead)
            recomputed = ahead if layout.recompute == "full" else Counter()
            for kind, sent in (behind + recomputed).items():
                traffic[1][kind] += sent * run.trained
    return traffic
