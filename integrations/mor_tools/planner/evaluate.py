"""What a training step costs in a parallel layout: memory, traffic and time of each stage.

Nothing is built: a model of any size on any number of devices is counted from its settings. Times
are FLOPs at `efficiency` of the peak plus bytes at the slowest link of the group, none of it
overlapped, played through the pipeline's schedule.
"""

from collections import Counter
from dataclasses import dataclass, replace

from mor_layers.costs import count_parameters
from mor_tools.planner.chunks import Chunk, Way, count_chunk
from mor_tools.planner.hardware import Hardware
from mor_tools.planner.layouts import Layout, Memory, Plan, StagePlan, Workload
from mor_tools.planner.schedule import Pass, simulate
from mor_tools.planner.stages import Part, place
from mor_tools.planner.traffic import Traffic, gradient_traffic, sequence_parallel_gradients


@dataclass(frozen=True)
class _Held:
    """Parameters that one rank of a stage holds."""

    dense: float
    experts: float
    whole: float
    """Of the dense ones, those that all tensor-parallel ranks hold."""


@dataclass(frozen=True)
class _Stage:
    """What is known of a stage before its schedule is played."""

    chunks: tuple[Chunk, ...]
    durations: list[tuple[float, float]]
    """Seconds of a forward and a backward pass, by chunk."""
    compute: float
    """Seconds of matrix products for a microbatch."""
    held: _Held

    @property
    def busy(self) -> float:
        """Seconds of all passes of a microbatch."""
        return sum(map(sum, self.durations))

    @property
    def kept(self) -> list[float]:
        """Bytes that a microbatch keeps for the backward pass, by chunk."""
        return [chunk.kept for chunk in self.chunks]


def evaluate(work: Workload, layout: Layout, hardware: Hardware, efficiency: float = 0.5) -> Plan:
    """Count one layout.

    Raises:
        ValueError: there are more stages than parts of the model.
    """
    stages, links = _stages(work, layout, hardware, efficiency), _links(layout, hardware)
    microbatches = _microbatches(work, layout)
    makespan, peaks = _play([s.durations for s in stages], microbatches, [s.kept for s in stages])
    plans = tuple(
        _stage_plan(work, layout, stage, peak, microbatches)
        for stage, peak in zip(stages, peaks, strict=True)
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
    kv_bytes = work.cost.kv_bytes(work.itemsize) / layout.tensor
    return Plan(layout, plans, makespan, times, model_flops / available, kv_bytes)


def timeline(
    work: Workload, layout: Layout, hardware: Hardware, efficiency: float = 0.5
) -> tuple[Pass, ...]:
    """When each pass of an optimizer step runs, in seconds: the schedule behind `evaluate`.

    Raises:
        ValueError: there are more stages than parts of the model.
    """
    stages = _stages(work, layout, hardware, efficiency)
    return simulate([stage.durations for stage in stages], _microbatches(work, layout))


def _microbatches(work: Workload, layout: Layout) -> int:
    return work.global_batch_size // (layout.data * layout.micro_batch_size)


def _stages(work: Workload, layout: Layout, hardware: Hardware, efficiency: float) -> list[_Stage]:
    speed, links = hardware.tflops * 1e12 * efficiency, _links(layout, hardware)
    placed = place(work.shape, layout.pipeline_layout, layout.pipeline)
    last = len(placed) - 1
    stages = []
    for p, own in enumerate(placed):
        chunks = tuple(
            count_chunk(work, layout, parts, p == v == 0, p == last and v == len(own) - 1)
            for v, parts in enumerate(own)
        )
        stages.append(
            _Stage(
                chunks,
                [
                    (_seconds(c.forward, speed, links), _seconds(c.backward, speed, links))
                    for c in chunks
                ],
                sum(c.forward.flops + c.backward.flops for c in chunks) / speed,
                _parameters(work, layout, own, p == 0, p == last),
            )
        )
    return stages


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
    """Of one rank of a stage."""
    shape = work.shape
    matrix = shape.vocab_size * shape.hidden_size / layout.tensor
    dense = matrix * first + (shape.hidden_size if last else 0)
    dense += matrix if last and not (first and shape.tie_embeddings) else 0
    experts, whole = 0.0, float(shape.hidden_size * last)
    cut = layout.expert if layout.expert > 1 else layout.tensor
    for part in (p for parts in chunks for p in parts if p.step == 0):
        counted = count_parameters(replace(shape, stacks=(part.stack,)))
        share = part.layers / part.stack.num_layers
        norms = counted.norms - shape.hidden_size  # without the last one
        # Deltas of steps: as if no rank cut them, which is true of one of each pair.
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
    # Beside bf16 weights an fp32 copy of them; in both cases Adam's two moments.
    states = 12 if work.is_bf16 else 8
    spread = held.dense / replicas + held.experts / expert_replicas
    count = held.dense + held.experts
    owned = spread if work.distributed_optimizer else count
    return Memory(count * work.itemsize, count * 4, owned * states, kept)


def _links(layout: Layout, hardware: Hardware) -> dict[str, float]:
    """Bytes per second that a rank of each group sends: ranks are laid out TP, CP, DP, PP."""
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


def _play(
    durations: list[list[tuple[float, float]]], microbatches: int, kept: list[list[float]]
) -> tuple[float, list[float]]:
    """Time from the first pass to the last, and the most that each stage keeps.

    Of many microbatches the schedule repeats itself: what is beyond a few turns is not played.
    """
    stages = len(durations)
    enough = 4 * stages
    played = min(microbatches, enough + microbatches % stages)
    passes = simulate(durations, played)
    makespan = max(run.end for run in passes)
    if microbatches > played:
        before = max(run.end for run in simulate(durations, played - stages))
        makespan += (makespan - before) * (microbatches - played) / stages
    held, peaks = [0.0] * stages, [0.0] * stages
    for run in passes:
        held[run.stage] += kept[run.stage][run.chunk] * (1 if run.is_forward else -1)
        peaks[run.stage] = max(peaks[run.stage], held[run.stage])
    return makespan, peaks
