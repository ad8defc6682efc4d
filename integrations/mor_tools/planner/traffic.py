"""Bytes that a rank sends in an optimizer step, by axis of parallelism and collective.

The counts assume ring algorithms. Each of `n` ranks sends `(n - 1) / n` of the output of an all-gather
or of the input of a reduce-scatter or an all-to-all, and twice that share for an all-reduce. Scalars
(loss, gradient norm) are not counted. The counts are those of mor_megatron and Megatron-Core 0.19, and
are tested against the collectives of real runs.

Legend: `s` sequence, `n` candidates of a step, `k` tokens that run it, `h` hidden, `b` batch.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from mor_layers.costs import ModelShape, StackShape

Axis = Literal["tensor", "context", "expert", "pipeline", "data"]
Traffic = Counter[tuple[str, str]]
"""Bytes by axis of parallelism and collective."""


@dataclass(frozen=True)
class Spread:
    """The properties of a layout that the traffic of a microbatch depends on."""

    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1
    expert: int = 1
    bytes_per_activation: int = 2

    @property
    def shards(self) -> int:
        """Number of ranks that split the rows of a recursion step."""
        return (self.tensor if self.sequence_parallel else 1) * self.context

    def padded(self, rows: float) -> float:
        """`rows`, rounded up to a multiple of the ranks that split them."""
        return -(-rows // self.shards) * self.shards


@dataclass(frozen=True)
class Rows:
    """Tokens of a sequence that a run of layers concerns."""

    running: float
    """Tokens that run the layers (k)."""
    projected: float
    """Tokens whose keys and values, or latent rows, are computed."""
    seen: float
    """Tokens whose keys and values attention sees."""


def _share(size: int) -> float:
    return (size - 1) / size


def run_traffic(
    shape: ModelShape, stack: StackShape, layers: float, given: Rows, spread: Spread
) -> tuple[Traffic, Traffic]:
    """Forward and backward traffic of a number of layers for one sequence."""
    ahead: Traffic = Counter()
    behind: Traffic = Counter()
    item, t, tokens = spread.bytes_per_activation, spread.tensor, given.running
    rows = spread.padded(tokens)
    hidden = layers * rows / spread.context * shape.hidden_size * item
    products = 1 if stack.mlp.num_experts else 2  # attention, and a dense MLP
    if t > 1 and spread.sequence_parallel:
        # The input of a product is gathered. The backward pass gathers it again, and scatters its
        # gradient. The output is scattered, and the backward pass gathers its gradient.
        ahead["tensor", "all_gather"] += products * hidden * _share(t)
        ahead["tensor", "reduce_scatter"] += products * hidden * _share(t)
        behind["tensor", "all_gather"] += 2 * products * hidden * _share(t)
        behind["tensor", "reduce_scatter"] += products * hidden * _share(t)
    elif t > 1:
        ahead["tensor", "all_reduce"] += products * 2 * hidden * _share(t)
        behind["tensor", "all_reduce"] += products * 2 * hidden * _share(t)
    if t > 1 and shape.latent is not None:
        for way, sent in zip(
            (ahead, behind), _latent_traffic(shape, stack, given, spread), strict=True
        ):
            for collective, numbers in sent.items():
                way["tensor", collective] += layers * numbers / spread.context * item * _share(t)
    if spread.context > 1:
        keys = layers * spread.padded(given.projected) * _gathered_keys(shape, stack, t) * item
        ahead["context", "all_gather"] += keys * _share(spread.context)
        behind["context", "reduce_scatter"] += keys * _share(spread.context)
    if stack.mlp.num_experts:
        # Without expert parallelism (EP = 1), the experts are split along their width by TP.
        cut = t if spread.expert == 1 else 1
        copies = layers * tokens / spread.shards * stack.mlp.experts_per_token
        moved, gates = copies * shape.hidden_size * item, copies * 4
        for way in (ahead, behind):
            way["expert", "all_to_all"] += (2 * moved + gates) * _share(spread.expert)
            way["tensor", "all_gather"] += (moved + gates * (way is ahead)) * cut * _share(cut)
            way["tensor", "reduce_scatter"] += (moved + gates * (way is behind)) * cut * _share(cut)
    return ahead, behind


def _is_routed(stack: StackShape) -> bool:
    return stack.num_recursions > 1 or stack.router is not None


def _gathered_keys(shape: ModelShape, stack: StackShape, tensor: int) -> float:
    """Numbers per token that context-parallel ranks gather in a layer."""
    if shape.latent is None:
        return 2 * shape.kv_size / tensor
    if _is_routed(stack):
        return shape.latent.row_size  # which all tensor-parallel ranks have
    return (shape.query_size + shape.latent.value_size) / tensor


def _latent_traffic(
    shape: ModelShape, stack: StackShape, given: Rows, spread: Spread
) -> tuple[Counter[str], Counter[str]]:
    """Numbers that the tensor-parallel ranks exchange in a layer of latent attention, beside those of
    the first projection of the queries and of the output, which any attention has.

    The columns of the down-projections are split, and gathered before the norms of latent rows.
    """
    latent = shape.latent
    assert latent is not None
    running, projected, seen = map(spread.padded, (given.running, given.projected, given.seen))
    c, r, q = latent.rank, latent.row_size - latent.rank, latent.query_rank
    hidden, rows = projected * shape.hidden_size, projected * (c + r)
    ahead: Counter[str] = Counter(all_gather=rows + running * q)  # columns
    behind: Counter[str] = Counter()
    if not spread.sequence_parallel:
        behind["all_reduce"] = 2 * (hidden + running * q + seen * (c + r))
        return ahead, behind
    # Inputs of the down-projection of keys and of both up-projections.
    inputs = hidden + running * q + seen * c
    ahead["all_gather"] += inputs
    behind["all_gather"] = inputs + running * q
    behind["reduce_scatter"] = inputs
    if _is_routed(stack):
        ahead["all_gather"] += projected * c
        behind["all_gather"] += (projected + seen) * c
        behind["all_reduce"] = 2 * seen * r
    else:
        ahead["all_gather"] += projected * r
        behind["all_gather"] += rows
        behind["reduce_scatter"] += projected * r
    return ahead, behind


def routing_traffic(
    shape: ModelShape, stack: StackShape, tokens: tuple[float, ...], length: float, spread: Spread,
    rotary_size: int,
) -> tuple[Traffic, Traffic]:  # fmt: skip
    """Forward and backward traffic of routing in a recursion for one sequence.

    This includes scores, gates and selected rows, but not the layers.

    Args:
        rotary_size: numbers per position in the rotary table, which context-parallel ranks gather.
    """
    ahead: Traffic = Counter()
    behind: Traffic = Counter()
    size = spread.shards
    if stack.router is None or size == 1:
        return ahead, behind
    axis = "context" if spread.context > 1 else "tensor"
    candidates = length
    for scorer, k in zip(stack.router.scorers, tokens, strict=True):
        if scorer:
            logits = scorer[-1].weights / shape.hidden_size if len(scorer) == 1 else 1
            ahead[axis, "all_gather"] += 4 * spread.padded(candidates) * logits * _share(size)
            behind[axis, "all_reduce"] += 2 * 4 * k * _share(size)  # gates
        if k < length:
            rows = spread.padded(k) * shape.hidden_size * spread.bytes_per_activation
            for way in (ahead, behind):
                way[axis, "all_gather"] += rows * _share(size)
                way[axis, "reduce_scatter"] += rows * _share(size)
        candidates = k
    if spread.context > 1:
        ahead["context", "all_gather"] += length * rotary_size * 4 * _share(spread.context)
        moved = 2 * length / size * shape.hidden_size * spread.bytes_per_activation
        for way in (ahead, behind):
            way["context", "all_to_all"] += moved * _share(size)
    return ahead, behind


def end_traffic(
    shape: ModelShape, first: bool, last: bool, length: float, spread: Spread
) -> tuple[Traffic, Traffic]:
    """Forward and backward traffic of the embedding, the output and the loss, for one sequence."""
    ahead: Traffic = Counter()
    behind: Traffic = Counter()
    t = spread.tensor
    if t == 1:
        return ahead, behind
    own = length / spread.context
    hidden = own * shape.hidden_size * spread.bytes_per_activation * _share(t)
    if spread.sequence_parallel:
        ahead["tensor", "reduce_scatter"] += hidden * first
        behind["tensor", "all_gather"] += hidden * (first + last)
        ahead["tensor", "all_gather"] += hidden * last
        behind["tensor", "reduce_scatter"] += hidden * last
    else:
        ahead["tensor", "all_reduce"] += 2 * hidden * first
        behind["tensor", "all_reduce"] += 2 * hidden * last
    # Cross-entropy over a split vocabulary all-reduces the maximum, the label's logit, and the sum
    # of exponentials.
    ahead["tensor", "all_reduce"] += 3 * 2 * 4 * own * _share(t) * last
    return ahead, behind


def sequence_parallel_gradients(parameters: float, tensor: int) -> Traffic:
    """Traffic of the gradients of weights that sequence parallelism replicates.

    All tensor-parallel ranks hold these weights, but each has different rows, so the gradients are
    summed.
    """
    return Counter({("tensor", "all_reduce"): 2 * 4 * parameters * _share(tensor)})


def gradient_traffic(
    parameters: float, expert_parameters: float, replicas: int, expert_replicas: int,
    bytes_per_parameter: int, distributed_optimizer: bool, bytes_per_gradient: int = 4,
) -> Traffic:  # fmt: skip
    """Traffic of gradients between replicas, and of parameters with a distributed optimizer."""
    traffic: Traffic = Counter()
    for count, size in ((parameters, replicas), (expert_parameters, expert_replicas)):
        part = count * _share(size)
        if distributed_optimizer:
            traffic["data", "reduce_scatter"] += part * bytes_per_gradient
            traffic["data", "all_gather"] += part * bytes_per_parameter
        else:
            traffic["data", "all_reduce"] += 2 * part * bytes_per_gradient
    return traffic
