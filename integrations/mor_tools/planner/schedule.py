"""Simulates pipeline schedules: 1F1B, interleaved if stages have several chunks.

The simulation runs the passes in Megatron-Core's order. Times have the unit of the given durations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice


@dataclass(frozen=True)
class Pass:
    """One forward or backward pass of a chunk, with its start and end."""

    stage: int
    chunk: int
    microbatch: int
    is_forward: bool
    start: float
    end: float


def simulate(durations: list[list[tuple[float, float]]], num_microbatches: int) -> tuple[Pass, ...]:
    """Simulate a schedule: 1F1B, interleaved if stages have several chunks.

    Args:
        durations: duration of the forward and the backward pass, by stage and chunk.

    Returns:
        All passes of an optimizer step, sorted by stage and then by time.
    """
    passes: list[list[Pass]] = [[] for _ in durations]
    _run(durations, num_microbatches, lambda stage, *rest: passes[stage].append(Pass(stage, *rest)))
    return tuple(run for stage in passes for run in stage)


def play(durations: list[list[tuple[float, float]]], num_microbatches: int) -> float:
    """The end of the last pass of an optimizer step. Faster than `simulate`, which lists all passes."""
    return _run(durations, num_microbatches, None)


def _run(
    durations: list[list[tuple[float, float]]],
    num_microbatches: int,
    record: Callable[[int, int, int, bool, float, float], None] | None,
) -> float:
    stages, chunks = len(durations), len(durations[0])
    # End of the passes by stage, chunk and direction, with one entry per microbatch. None: not run.
    kinds = [(p, c, f) for p in range(stages) for c in range(chunks) for f in (True, False)]
    ends: dict[tuple[int, int, bool], list[float | None]] = {
        kind: [None] * num_microbatches for kind in kinds
    }
    needs = {}
    for kind in kinds:
        before = _before(*kind, stages, chunks)
        needs[kind] = None if before is None else ends[before]
    orders = [order_of_passes(p, stages, chunks, num_microbatches) for p in range(stages)]
    done, clock = [0] * stages, [0.0] * stages
    waiting = True
    while waiting:
        waiting = False
        for p, order in enumerate(orders):
            now, first = clock[p], done[p]
            for chunk, microbatch, is_forward in islice(order, first, None):
                needed, start = needs[p, chunk, is_forward], now
                if needed is not None:
                    ready = needed[microbatch]
                    if ready is None:
                        break
                    start = max(now, ready)
                now = start + durations[p][chunk][not is_forward]
                ends[p, chunk, is_forward][microbatch] = now
                if record is not None:
                    record(p, chunk, microbatch, is_forward, start, now)
                done[p] += 1
            clock[p] = now
            waiting |= done[p] > first
    assert done == [len(order) for order in orders], "the schedule does not end"
    return max(clock)


def _before(
    p: int, chunk: int, is_forward: bool, stages: int, chunks: int
) -> tuple[int, int, bool] | None:
    """The pass of the same microbatch that must end before a pass can start."""
    if is_forward:
        if p > 0:
            return p - 1, chunk, True
        return (stages - 1, chunk - 1, True) if chunk else None
    if p < stages - 1:
        return p + 1, chunk, False
    return (0, chunk + 1, False) if chunk < chunks - 1 else (p, chunk, True)


def order_of_passes(
    p: int, stages: int, chunks: int, microbatches: int
) -> list[tuple[int, int, bool]]:
    """Chunk, microbatch and direction of each pass of a stage, in Megatron's order."""
    group = stages if chunks > 1 else microbatches
    table = [
        (chunk, microbatch)
        for first in range(0, microbatches, group)
        for chunk in range(chunks)
        for microbatch in range(first, min(first + group, microbatches))
    ]
    warmup = stages - p - 1
    if chunks > 1:
        warmup = 2 * warmup + (chunks - 1) * group
    warmup = min(warmup, len(table))
    forward = [(chunk, microbatch, True) for chunk, microbatch in table]
    backward = [(chunks - 1 - chunk, microbatch, False) for chunk, microbatch in table]
    order = forward[:warmup]
    for ahead, behind in zip(forward[warmup:], backward, strict=False):
        order += [ahead, behind]
    return order + backward[len(table) - warmup :]
