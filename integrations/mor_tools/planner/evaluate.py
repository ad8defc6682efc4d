"""The cost of a training step in a parallel layout: memory, traffic and time of each stage.

All numbers follow from the settings, so no model is built and its size and the number of devices are
not limited. The time of a pass is its FLOPs at `efficiency` of the peak, plus its bytes at the slowest
link of the group, without overlap. The time of a step follows from simulating the pipeline's schedule.
"""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import accumulate

from mor_layers.costs import count_parameters
from mor_tools.planner.chunks import Chunk, Way, count_chunk
from mor_tools.planner.hardware import Hardware
from mor_tools.planner.layouts import Layout, Memory, Plan, StagePlan, Workload
from mor_tools.planner.schedule import Pass, order_of_passes, play, simulate
from mor_tools.planner.stages import Part, place
from mor_tools.planner.traffic import Traffic, gradient_traffic, sequence_parallel_gradients

TURNS = 4
"""Number of microbatches per stage that are simulated. After that the schedule is periodic."""


@dataclass(frozen=True)
class _Held:
    """Number of parameters on one rank of a stage."""

    dense: float
    experts: float
    whole: float
    """The part of `dense` that is replicated on all tensor-parallel ranks."""


@dataclass(frozen=True)
class _Stage:
    """The cost of a stage before the schedule is simulated."""

    chunks: tuple[Chunk, ...]
    durations: list[tuple[float, float]]
    """Seconds of the forward and the backward pass of each chunk."""
    compute: float
    """Seconds of matrix products per microbatch."""
    held: _Held

    @property
    def busy(self) -> float:
        """Seconds of all passes per microbatch."""
        return sum(map(sum, self.durations))

    @property
    def kept(self) -> list[float]:
        """Bytes that each chunk keeps for the backward pass of a microbatch."""
        return [chunk.kept for chunk in self.chunks]


def evaluate(work: Workload, layout: Layout, hardware: Hardware, efficiency: float = 0.5) -> Plan:
    """Estimate the cost of one layout.

    Raises:
        ValueError: there are more stages than parts of the model.
    """
    stages, links = _stages(work, layout, hardware, efficiency), _links(layout, hardware)
    microbatches = _microbatches(work, layout)
    makespan = _makespan([stage.durations for stage in stages], microbatches)
    plans = tuple(
        _stage_plan(
            work, layout, stage, _peak(p, len(stages), stage.kept, microbatches), microbatches
        )
        for p, stage in enumerate(stages)
    )
    slowest = max(plans, key=lambda stage: stage.busy)
    times = {
        "compute": slowest.compute,
        "communication": slowest.busy - slowest.compute,
        "waiting": makespan - slowest.busy,
        "gradients": max(_sent_along("data", stage.traffic) for stage in plans) / links["data"],
    }
    model_flops = work.cost.training.total * work.global_batch_size
    available = sum(times.values()) * hardware.tflops * 1e12 * layout.num_devices
    kv_bytes = work.kv_bytes / work.split_caches(layout.tensor)
    return Plan(layout, plans, makespan, times, model_flops / available, kv_bytes)


def timeline(
    work: Workload, layout: Layout, hardware: Hardware, efficiency: float = 0.5
) -> tuple[Pass, ...]:
    """The start and end in seconds of each pass of an optimizer step, as `evaluate` simulates it.

    Raises:
        ValueError: there are more stages than parts of the model.
    """
    stages = _stages(work, layout, hardware, efficiency)
    return simulate([stage.durations for stage in stages], _microbatches(work, layout))


def _microbatches(work: Workload, layout: Layout) -> int:
    return work.global_batch_size // (layout.data * layout.micro_batch_size)


def _stages(work: Workload, layout: Layout, hardware: Hardware, efficiency: float) -> list[_Stage]:
    placed = place(work.shape, layout.pipeline_layout, layout.pipeline, work.part_depths)
    last = len(placed) - 1
    alike: dict[Hashable, _Stage] = {}
    stages = []
    for p, chunks in enumerate(placed):
        # Most stages of a deep model run the same layers, so each kind of stage is counted once.
        kind = tuple(
            tuple((id(part.stack), part.step, part.layers, part.first) for part in parts)
            for parts in chunks
        )
        key = (kind, p == 0, p == last)
        if key not in alike:
            alike[key] = _stage(work, layout, chunks, p == 0, p == last, hardware, efficiency)
        stages.append(alike[key])
    return stages


def _stage(
    work: Workload, layout: Layout, chunks: list[list[Part]], first: bool, last: bool,
    hardware: Hardware, efficiency: float,
) -> _Stage:  # fmt: skip
    speed, links = hardware.tflops * 1e12 * efficiency, _links(layout, hardware)
    end = len(chunks) - 1
    counted = tuple(
        count_chunk(work, layout, parts, first and v == 0, last and v == end)
        for v, parts in enumerate(chunks)
    )
    return _Stage(
        counted,
        [(_seconds(c.forward, speed, links), _seconds(c.backward, speed, links)) for c in counted],
        sum(c.forward.flops + c.backward.flops for c in counted) / speed,
        _parameters(work, layout, chunks, first, last),
    )


def _seconds(way: Way, speed: float, links: dict[str, float]) -> float:
    return way.flops / speed + sum(size / links[axis] for (axis, _), size in way.sent.items())


def _sent_along(axis: str, traffic: Traffic) -> float:
    return sum(size for (own, _), size in traffic.items() if own == axis)


def _stage_plan(
    work: Workload, layout: Layout, stage: _Stage, peak: float, microbatches: int
) -> StagePlan:
    held, replicas = stage.held, layout.data * layout.context
    expert_replicas = max(1, replicas * (layout.tensor if layout.expert > 1 else 1)
                          // layout.expert)  # fmt: skip
    sent: Traffic = Counter()
    for chunk in stage.chunks:
        for way in (chunk.forward, chunk.backward):
            for key, size in way.sent.items():
                sent[key] += size * microbatches
    sent += sequence_parallel_gradients(held.whole * layout.sequence_parallel, layout.tensor)
    sent += gradient_traffic(
        held.dense, held.experts, replicas, expert_replicas, work.itemsize,
        work.distributed_optimizer,
    )  # fmt: skip
    kept = peak + max(chunk.recomputed for chunk in stage.chunks)
    return StagePlan(
        held.dense + held.experts,
        _memory(work, held, replicas, expert_replicas, kept),
        sent,
        stage.compute * microbatches,
        stage.busy * microbatches,
    )


def _parameters(
    work: Workload, layout: Layout, chunks: list[list[Part]], first: bool, last: bool
) -> _Held:
    """Number of parameters on one rank of a stage."""
    shape = work.shape
    matrix = shape.vocab_size * shape.hidden_size / layout.tensor
    dense = matrix * first + (shape.hidden_size if last else 0)
    dense += matrix if last and not (first and shape.tie_embeddings) else 0
    experts, whole = 0.0, float(shape.hidden_size * last)
    cut = layout.expert if layout.expert > 1 else layout.tensor
    for part in (p for parts in chunks for p in parts if p.step == 0):
        counted = count_parameters(replace(shape, stacks=(part.stack,)))
        share = part.layers / part.stack.num_layers
        norms = counted.norms - shape.hidden_size  # without the final norm of the model
        # The two matrices of a delta are counted as replicated, but only one of them is.
        own = share * (norms + counted.expert_router + counted.deltas)
        own += counted.depth_router if part.first else 0
        whole += own
        dense += own + share * counted.projections / layout.tensor
        if part.stack.mlp.num_experts:
            experts += share * counted.mlp / cut
        else:
            dense += share * counted.mlp / layout.tensor
    return _Held(dense, experts, whole)


def _memory(
    work: Workload, held: _Held, replicas: int, expert_replicas: int, kept: float
) -> Memory:
    # Bytes per parameter of Adam's two moments in fp32, and of the fp32 copy of bf16 weights.
    states = 12 if work.is_bf16 else 8
    spread = held.dense / replicas + held.experts / expert_replicas
    count = held.dense + held.experts
    owned = spread if work.distributed_optimizer else count
    return Memory(count * work.itemsize, count * 4, owned * states, kept)


def _links(layout: Layout, hardware: Hardware) -> dict[str, float]:
    """Bytes per second that a rank can send in each group.

    Ranks are ordered TP, CP, DP, PP from the innermost axis, so a group fits into a node if its
    width does.
    """
    widths = {
        "tensor": layout.tensor,
        "context": layout.tensor * layout.context,
        "expert": layout.expert,
        "data": layout.num_devices // layout.pipeline,
        "pipeline": layout.num_devices,
    }
    return {
        axis: 1e9 * (hardware.intra_gbps if w <= hardware.per_node else hardware.inter_gbps)
        for axis, w in widths.items()
    }


def _makespan(durations: list[list[tuple[float, float]]], microbatches: int) -> float:
    """Time from the start of the first pass to the end of the last one.

    With many microbatches the schedule becomes periodic, so only the first ones are simulated and
    the rest is extrapolated.
    """
    stages = len(durations)
    played = min(microbatches, TURNS * stages + microbatches % stages)
    makespan = play(durations, played)
    if microbatches > played:
        before = play(durations, played - stages)
        makespan += (makespan - before) * (microbatches - played) / stages
    return makespan


def _peak(stage: int, stages: int, kept: list[float], microbatches: int) -> float:
    """The largest number of bytes that a stage keeps at any time.

    Args:
        kept: bytes that each chunk keeps per microbatch.
    """
    # The number of microbatches in flight reaches its maximum within the simulated ones.
    played = min(microbatches, TURNS * stages + microbatches % stages)
    held = accumulate(
        kept[chunk] if is_forward else -kept[chunk]
        for chunk, _, is_forward in order_of_passes(stage, stages, len(kept), played)
    )
    return max(held)
