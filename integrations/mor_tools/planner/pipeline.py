"""What a recursion costs on a pipeline, from settings alone: memory, bubble and traffic.

Two layouts of the same model:

    one_stage         the recursion lies in one stage, all its steps; other layers in stages around
                      it; plain 1F1B schedule.
    steps_as_stages   the block's K layers are spread over all stages and step r is virtual stage r;
                      interleaved schedule.

Times are FLOPs at one speed: they show the shape of a schedule, not seconds. The schedule is played
through, event by event, in Megatron's order, because later steps run fewer tokens and stages are
uneven: formulas for equal stages do not hold.

Legend: `s` sequence, `b` microbatch size, `h` hidden, `p` stage, `v` virtual stage, `m` microbatch.
"""

import math
from dataclasses import dataclass, replace
from itertools import accumulate, combinations, pairwise
from typing import Literal, get_args

from mor_layers import DecoderConfig, RecursionConfig
from mor_layers.costs import Accounting, ModelShape, StackShape, account, count_parameters
from mor_tools.planner.schedule import Pass, simulate

PipelineLayout = Literal["one_stage", "steps_as_stages"]


@dataclass(frozen=True)
class PipelinePlan:
    """How a model is spread and fed."""

    layout: PipelineLayout
    """Where the recursion lies."""
    stages: int
    """Ranks of the pipeline."""
    num_microbatches: int
    """Microbatches of each pipeline per optimizer step."""
    microbatch_size: int = 1
    """Sequences in a microbatch (b)."""
    tensor_parallel: int = 1
    """Ranks that share each layer, and with sequence parallelism each sequence."""
    data_parallel: int = 1
    """Replicas of the pipeline."""
    bytes_per_parameter: int = 2
    """Weights, as the model computes with them."""
    bytes_per_gradient: int = 4
    """Gradients, as they are accumulated."""
    bytes_per_optimizer_state: int = 12
    """Per parameter: an fp32 copy and Adam's two moments."""
    bytes_per_activation: int = 2
    """Hidden states and what is kept for the backward pass."""
    distributed_optimizer: bool = True
    """Whether replicas share the optimizer's state."""
    recompute: bool = False
    """Whether a chunk keeps only its input and computes its layers again in the backward pass.
    (The layer being computed again then needs its activations too; they are not counted.)"""

    def __post_init__(self) -> None:
        if self.layout not in get_args(PipelineLayout):
            known = ", ".join(get_args(PipelineLayout))
            raise ValueError(f"layout={self.layout!r} is unknown. Use one of {known}.")
        for name in ("stages", "num_microbatches", "microbatch_size", "tensor_parallel",
                     "data_parallel"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def num_gpus(self) -> int:
        return self.stages * self.tensor_parallel * self.data_parallel


@dataclass(frozen=True)
class StageAccount:
    """What one GPU of a stage holds and sends; bytes."""

    parameters: float
    """Parameters, as a number."""
    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    activation_bytes: float
    """The largest sum of what waits for a backward pass at any time."""
    sent_bytes: float
    """Sent to neighbouring stages per optimizer step, both directions."""
    busy: float
    """FLOPs per optimizer step."""

    @property
    def memory_bytes(self) -> float:
        parts = (
            self.weight_bytes,
            self.gradient_bytes,
            self.optimizer_bytes,
            self.activation_bytes,
        )
        return sum(parts)


@dataclass(frozen=True)
class PipelineAccount:
    """What a plan costs."""

    plan: PipelinePlan
    stages: tuple[StageAccount, ...]
    passes: tuple[Pass, ...]
    """The schedule of one optimizer step."""
    carried_rows: int
    """Rows of hidden size that travel between two stages per sequence."""

    @property
    def makespan(self) -> float:
        """FLOPs that one GPU could do from the first pass to the last."""
        return max(run.end for run in self.passes)

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they wait."""
        return 1.0 - sum(stage.busy for stage in self.stages) / (self.makespan * len(self.stages))

    @property
    def time_per_sequence(self) -> float:
        """FLOP-times of the whole machine per sequence: what layouts of equal size compare by."""
        plan = self.plan
        sequences = plan.num_microbatches * plan.microbatch_size * plan.data_parallel
        return self.makespan * plan.num_gpus / sequences


@dataclass(frozen=True)
class _Chunk:
    """What a chunk of a stage does for one microbatch, on one GPU."""

    forward: float
    backward: float
    activation_bytes: float


def pipeline_account(
    model: DecoderConfig,
    plan: PipelinePlan,
    sequence_length: int,
    tokens_per_step: tuple[float, ...] | None = None,
) -> PipelineAccount:
    """Play an optimizer step through and count.

    Args:
        tokens_per_step: as for `accounting.account`; needed for routers that keep any share.

    Raises:
        ValueError: layers that do not spread over the stages, or too few microbatches.
    """
    shape, recursion = ModelShape.from_decoder(model), model.recursion
    if recursion is None or not recursion.schedule(model.num_unrolled_layers).is_cyclic:
        raise ValueError("only a model with cycle or middle_cycle recursion has these layouts.")
    cost = account(shape, sequence_length, tokens_per_step)
    steps = recursion.num_recursions
    rows = sequence_length
    if plan.layout == "steps_as_stages":
        _check_spread(shape, plan, steps)
        ranks = plan.tensor_parallel
        rows = carried_length(
            recursion, model.hidden_size, sequence_length, plan.bytes_per_activation, ranks
        )
        parameters, chunks = _spread(shape, plan, cost, rows)
    else:
        parameters, chunks = _whole(shape, plan, cost, rows)
    passes = simulate(
        [[(chunk.forward, chunk.backward) for chunk in stage] for stage in chunks],
        plan.num_microbatches,
    )
    hop = rows * plan.microbatch_size * model.hidden_size * plan.bytes_per_activation
    hop *= plan.num_microbatches / plan.tensor_parallel
    stages = []
    for p, (count, own) in enumerate(zip(parameters, chunks, strict=True)):
        at_start, at_end = p == 0, p == plan.stages - 1
        sends = 2 * len(own) - at_start - at_end  # forward but at the very end, backward likewise
        states = plan.bytes_per_optimizer_state
        states /= plan.data_parallel if plan.distributed_optimizer else 1
        stages.append(
            StageAccount(
                parameters=count,
                weight_bytes=count * plan.bytes_per_parameter,
                gradient_bytes=count * plan.bytes_per_gradient,
                optimizer_bytes=count * states,
                activation_bytes=_peak(passes, p, [chunk.activation_bytes for chunk in own]),
                sent_bytes=0.0 if plan.stages == 1 else sends * hop,
                busy=sum(run.end - run.start for run in passes if run.stage == p),
            )
        )
    return PipelineAccount(plan, tuple(stages), passes, rows)


def carried_length(
    recursion: RecursionConfig, hidden_size: int, sequence_length: int, itemsize: int = 2,
    ranks: int = 1,
) -> int:  # fmt: skip
    """Rows that travel between stages where steps are virtual stages.

    The sequence, the tokens inside the block, and bits: for each of those its position, its gate
    and what the router planned.
    """
    router, steps = recursion.router, recursion.num_recursions
    notes = max(step.numbers for step in router.notes_for(steps))
    factors = router.capacity_factors_for(steps) if router.has_fixed_capacities else None
    if factors == (1.0,) * steps and not notes:
        return sequence_length
    room = sequence_length
    if factors is not None:
        room = max(1, math.floor(factors[0] * sequence_length))
    words = 1 + room * (1 + notes)
    bits = -(-words * 4 // (itemsize * hidden_size))
    return sequence_length + ranks * (-(-room // ranks) + bits)


def _peak(passes: tuple[Pass, ...], stage: int, bytes_of_chunk: list[float]) -> float:
    held = accumulate(
        bytes_of_chunk[run.chunk] * (1 if run.is_forward else -1)
        for run in passes
        if run.stage == stage
    )
    return max(held)


def _check_spread(shape: ModelShape, plan: PipelinePlan, steps: int) -> None:
    size = next(stack.num_layers for stack in shape.stacks if stack.name == "block")
    if size % plan.stages:
        below = size - size % plan.stages
        fitting = " or ".join(str(n) for n in (below, below + plan.stages) if n)
        raise ValueError(
            f"a block of {size} layers does not spread evenly over {plan.stages} stages. Use a "
            f"block of {fitting} layers, or another number of stages."
        )
    if plan.stages < 2 or steps < 2:
        raise ValueError("nothing goes round. Use at least 2 stages and 2 recursions.")
    rest = plan.num_microbatches % plan.stages
    if plan.num_microbatches < plan.stages or rest:
        raise ValueError(
            f"num_microbatches={plan.num_microbatches} must be a multiple of {plan.stages} stages."
        )


def _spread(
    shape: ModelShape, plan: PipelinePlan, cost: Accounting, rows: int
) -> tuple[list[float], list[list[_Chunk]]]:
    """Parameters and chunks of each stage where steps are virtual stages."""
    (block,) = (stack for stack in shape.stacks if stack.name == "block")
    runs = {name: [run for run in cost.steps if run.stack == name] for name in
            ("prelude", "block", "coda")}  # fmt: skip
    parameters, chunks = [], []
    for p in range(plan.stages):
        first, last = p == 0, p == plan.stages - 1
        count = _layers(shape, block) / plan.stages
        own = []
        for v, run in enumerate(runs["block"]):
            forward, backward = (
                (part.total - part.depth_router) / plan.stages + part.depth_router * first
                for part in (run.forward, run.backward)
            )
            held = _kept(shape, plan, block, run.tokens) * block.num_layers / plan.stages
            before = runs["prelude"] if first and v == 0 else []
            after = runs["coda"] if last and v == len(runs["block"]) - 1 else []
            for other in (*before, *after):
                forward, backward = forward + other.forward.total, backward + other.backward.total
                (stack,) = (x for x in shape.stacks if x.name == other.stack)
                held += _kept(shape, plan, stack, other.tokens)
                count += _layers(shape, stack)
            if last and v == len(runs["block"]) - 1:
                forward += cost.forward.output
                backward += cost.backward.output
            own.append(_chunk(shape, plan, forward, backward, held, rows))
        count += _ends(shape, first, last) + (count_parameters(shape).depth_router if first else 0)
        parameters.append(count / plan.tensor_parallel)
        chunks.append(own)
    return parameters, chunks


def _whole(
    shape: ModelShape, plan: PipelinePlan, cost: Accounting, rows: int
) -> tuple[list[float], list[list[_Chunk]]]:
    """Parameters and chunks of each stage where the recursion lies in one."""
    stacks = shape.stacks
    if plan.stages > len(stacks):
        raise ValueError(
            f"{plan.stages} stages exceed the {len(stacks)} parts of the model, and a recursion in "
            f"one stage is not cut. Use {len(stacks)} stages or fewer, or steps_as_stages."
        )
    depths = [stack.num_layers * stack.num_recursions for stack in stacks]
    cuts = min(
        combinations(range(1, len(stacks)), plan.stages - 1),
        key=lambda cuts: max(sum(depths[a:b]) for a, b in pairwise((0, *cuts, len(stacks)))),
    )
    runs, starts = list(cost.steps), [0, *accumulate(stack.num_recursions for stack in stacks)]
    parameters, chunks = [], []
    for p, (begin, end) in enumerate(pairwise((0, *cuts, len(stacks)))):
        first, last = p == 0, p == plan.stages - 1
        count, forward, backward, held = _ends(shape, first, last), 0.0, 0.0, 0.0
        for index in range(begin, end):
            stack = stacks[index]
            count += _layers(shape, stack)
            if stack.router:
                count += count_parameters(shape).depth_router
            for run in runs[starts[index] : starts[index + 1]]:
                forward, backward = forward + run.forward.total, backward + run.backward.total
                held += _kept(shape, plan, stack, run.tokens) * stack.num_layers
        if last:
            forward, backward = forward + cost.forward.output, backward + cost.backward.output
        parameters.append(count / plan.tensor_parallel)
        chunks.append([_chunk(shape, plan, forward, backward, held, rows)])
    return parameters, chunks


def _layers(shape: ModelShape, stack: StackShape) -> float:
    """Parameters of a stack's layers."""
    with_it = count_parameters(replace(shape, stacks=(replace(stack, router=None),)))
    return with_it.total - count_parameters(replace(shape, stacks=())).total


def _ends(shape: ModelShape, first: bool, last: bool) -> float:
    """Parameters of the embedding, and of the last norm and the output; a tied matrix twice."""
    matrix = shape.vocab_size * shape.hidden_size
    own_output = last and not (first and shape.tie_embeddings)
    return matrix * first + matrix * own_output + shape.hidden_size * last


def _kept(shape: ModelShape, plan: PipelinePlan, stack: StackShape, tokens: float) -> float:
    """Bytes that a layer keeps of a microbatch for the backward pass.

    Inputs of norms and products, what attention needs without its scores, and the MLP's widths; as
    with fused attention, sequence parallelism and no dropout.
    """
    mlp = stack.mlp
    widths = mlp.experts_per_token * mlp.ffn_hidden_size + mlp.shared_ffn_hidden_size
    numbers = 4 * shape.hidden_size + 2 * shape.query_size + 2 * shape.kv_size
    numbers += (3 if mlp.gated else 2) * widths
    return tokens * numbers * plan.microbatch_size * plan.bytes_per_activation


def _chunk(
    shape: ModelShape, plan: PipelinePlan, forward: float, backward: float, kept: float, rows: int
) -> _Chunk:
    arrived = rows * shape.hidden_size * plan.microbatch_size * plan.bytes_per_activation
    if plan.recompute:
        kept, backward = 0.0, backward + forward
    scale = plan.microbatch_size / plan.tensor_parallel
    return _Chunk(forward * scale, backward * scale, (arrived + kept) / plan.tensor_parallel)
