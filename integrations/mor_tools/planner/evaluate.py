"""What a training step costs in a parallel layout: memory, traffic, time of the fullest rank.

Nothing is built: a model of any size on any number of devices is counted from its settings. Times
are FLOPs at `efficiency` of the peak plus bytes at the slowest link of the group, none of it
overlapped, played through the pipeline's schedule.
"""

from collections import Counter
from dataclasses import replace

from mor_layers.costs import count_parameters
from mor_tools.planner.hardware import Hardware
from mor_tools.planner.layouts import Layout, Memory, Plan, Workload
from mor_tools.planner.memory import (
    Kept,
    kept_by_layer,
    kept_by_output,
    kept_by_routing,
    kept_input,
)
from mor_tools.planner.pipeline import carried_length
from mor_tools.planner.schedule import simulate
from mor_tools.planner.stages import Part, place
from mor_tools.planner.traffic import (
    Spread,
    Traffic,
    end_traffic,
    gradient_traffic,
    routing_traffic,
    run_traffic,
    sequence_parallel_gradients,
)


def evaluate(work: Workload, layout: Layout, hardware: Hardware, efficiency: float = 0.5) -> Plan:
    """Count one layout.

    Raises:
        ValueError: layers that do not spread over its stages.
    """
    shape, b = work.shape, layout.micro_batch_size
    spread = Spread(
        layout.tensor, layout.sequence_parallel, layout.context, layout.expert, work.itemsize
    )
    stages = place(shape, layout.pipeline_layout, layout.pipeline)
    microbatches = work.global_batch_size // (layout.data * b)
    speed = hardware.tflops * 1e12 * efficiency
    links = _links(layout, hardware)
    runs = _runs(work)
    durations, kept, sent, compute, repeated = [], [], [], [], []
    for p, chunks in enumerate(stages):
        own: list[tuple[float, float]] = []
        stage_kept, stage_sent, stage_compute, again = [], Counter(), 0.0, 0.0
        for v, parts in enumerate(chunks):
            at_start, at_end = p == v == 0, (p, v) == (len(stages) - 1, len(chunks) - 1)
            flops, bytes_kept, bytes_again, traffic = _chunk(
                work, layout, spread, parts, runs, at_start, at_end
            )
            again = max(again, bytes_again * b)
            hop = _hop(work, layout)
            ways = [dict(t) for t in traffic]
            for way, is_ahead in zip(ways, (True, False), strict=True):
                if len(stages) > 1 and not (at_end if is_ahead else at_start):
                    way["pipeline", "send"] = hop / b
            seconds = [f * b / speed for f in flops]
            stage_compute += sum(seconds) * microbatches
            own.append(tuple(x + _seconds(w, links, b) for x, w in zip(seconds, ways, strict=True)))  # type: ignore[arg-type]
            for way in ways:
                for key, value in way.items():
                    stage_sent[key] += value * b * microbatches
            stage_kept.append(bytes_kept * b + (hop if len(stages) > 1 and not at_start else 0))
        durations.append(own)
        kept.append(stage_kept)
        sent.append(stage_sent)
        compute.append(stage_compute)
        repeated.append(again)
    makespan, peaks = _play(durations, microbatches, kept)
    peaks = [peak + more for peak, more in zip(peaks, repeated, strict=True)]
    busy = [sum(sum(c) for c in own) * microbatches for own in durations]
    counts = [_parameters(work, layout, chunks, p, len(stages)) for p, chunks in enumerate(stages)]
    replicas = layout.data * layout.context
    expert_replicas = max(1, replicas * (layout.tensor if layout.expert > 1 else 1)
                          // layout.expert)  # fmt: skip
    memories, totals = [], []
    for own_sent, (dense, experts, whole), peak in zip(sent, counts, peaks, strict=True):
        totals.append(
            own_sent
            + sequence_parallel_gradients(whole * layout.sequence_parallel, layout.tensor)
            + gradient_traffic(
                dense, experts, replicas, expert_replicas, work.itemsize, work.distributed_optimizer
            )
        )
        memories.append(_memory(work, dense, experts, replicas, expert_replicas, peak))
    fullest = max(range(len(stages)), key=lambda p: memories[p].total)
    slowest = max(range(len(stages)), key=lambda p: busy[p])
    most = max(totals, key=lambda t: sum(t.values()))
    data_seconds = max(
        sum(v for (axis, _), v in t.items() if axis == "data") / links["data"] for t in totals
    )
    times = {
        "compute": compute[slowest],
        "communication": busy[slowest] - compute[slowest],
        "waiting": makespan - busy[slowest],
        "gradients": data_seconds,
    }
    model_flops = work.cost.training.total * work.global_batch_size
    available = sum(times.values()) * hardware.tflops * 1e12 * layout.num_devices
    return Plan(
        layout, memories[fullest], sum(counts[fullest][:2]), +most,
        1 - sum(busy) / (makespan * len(stages)), times, model_flops / available,
        work.cost.kv_bytes(work.itemsize) / layout.tensor,
    )  # fmt: skip


def _runs(work: Workload) -> dict[tuple[int, int], int]:
    """Place in `cost.steps` of each stack's steps."""
    keys = [(i, r) for i, x in enumerate(work.shape.stacks) for r in range(x.num_recursions)]
    return {key: place for place, key in enumerate(keys)}


def _chunk(
    work: Workload, layout: Layout, spread: Spread, parts: list[Part],
    runs: dict[tuple[int, int], int], at_start: bool, at_end: bool,
) -> tuple[tuple[float, float], float, float, tuple[Traffic, Traffic]]:  # fmt: skip
    """Of one sequence, on one rank: FLOPs forward and backward, bytes kept, bytes that recomputation
    needs for a moment, and traffic."""
    shape, s, steps = work.shape, work.sequence_length, work.cost.steps
    shards = layout.tensor * layout.context
    how = Kept(work.itemsize, layout.tensor, layout.sequence_parallel)
    ahead, behind = 0.0, 0.0
    entries: Counter[int] = Counter()  # bytes by stack: what is recomputed together
    traffic = end_traffic(shape, at_start, at_end, s, spread)
    for part in parts:
        run, share = steps[runs[part.index, part.step]], part.layers / part.stack.num_layers
        flops = [
            ((way.total - way.depth_router) * share + way.depth_router * part.first) / shards
            for way in (run.forward, run.backward)
        ]
        again = {"none": 0.0, "selective": run.forward.attention * share / shards}
        ahead += flops[0]
        behind += flops[1] + again.get(layout.recompute, flops[0])
        before = steps[runs[part.index, part.step - 1]].tokens if part.step else s
        entries[part.index] += part.layers * kept_by_layer(
            shape, part.stack, run.tokens / layout.context, how
        ) + part.first * kept_by_routing(
            shape, part.stack, part.step, before / layout.context, run.tokens / layout.context, how
        )
        projected = run.kv_numbers / (2 * shape.kv_size * part.stack.num_layers)
        own = run_traffic(shape, part.stack, part.layers, run.tokens, projected, spread)
        if layout.recompute == "full":
            own[1].update(own[0])
        for total, more in zip(traffic, own, strict=True):
            total.update(more)
        if part.step == 0 and part.stack.num_recursions > 1:
            tokens = tuple(
                steps[runs[part.index, r]].tokens for r in range(part.stack.num_recursions)
            )
            routing = routing_traffic(shape, part.stack, tokens, s, spread, work.model.head_size)
            if layout.recompute == "full":
                routing[1].update(routing[0])
            for total, more in zip(traffic, routing, strict=True):
                total.update(more)
    kept, for_a_moment = float(sum(entries.values())), 0.0
    if layout.recompute == "full":
        kept = len(entries) * kept_input(shape, s / layout.context, how)
        for_a_moment = max(entries.values(), default=0.0)
    if at_end:
        ahead += work.cost.forward.output / shards
        behind += work.cost.backward.output / shards
        kept += kept_by_output(shape, s / layout.context, how)
    return (ahead, behind), kept, for_a_moment, traffic


def _hop(work: Workload, layout: Layout) -> float:
    """Bytes that go from one stage to the next for a microbatch."""
    rows: float = work.sequence_length
    recursion, ranks = work.model.recursion, layout.tensor if layout.sequence_parallel else 1
    if layout.pipeline_layout == "steps_as_stages" and recursion is not None:
        rows = carried_length(recursion, work.model.hidden_size, int(rows), work.itemsize, ranks)
    rows *= layout.micro_batch_size / layout.context / ranks
    return rows * work.model.hidden_size * work.itemsize


def _parameters(
    work: Workload, layout: Layout, chunks: list[list[Part]], stage: int, stages: int
) -> tuple[float, float, float]:
    """Of one rank of a stage: dense ones, experts, and which of the dense all TP ranks hold."""
    shape = work.shape
    matrix = shape.vocab_size * shape.hidden_size / layout.tensor
    first, last = stage == 0, stage == stages - 1
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
    return dense, experts, whole


def _memory(
    work: Workload, dense: float, experts: float, replicas: int, expert_replicas: int, kept: float
) -> Memory:
    # Beside bf16 weights an fp32 copy of them; in both cases Adam's two moments.
    states = 12 if work.is_bf16 else 8
    spread = dense / replicas + experts / expert_replicas
    owned = spread if work.distributed_optimizer else dense + experts
    count = dense + experts
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


def _seconds(traffic: dict[tuple[str, str], float], links: dict[str, float], b: int) -> float:
    return sum(value * b / links[axis] for (axis, _), value in traffic.items())


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
