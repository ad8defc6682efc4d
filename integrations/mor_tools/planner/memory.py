"""Bytes of activations that a rank keeps for the backward pass, per sequence.

The formulas count the tensors that autograd saves in Megatron's local layers with
`scaled_dot_product_attention`. Fused norms and activations save less, so for them a plan is an upper
bound.

Legend: `n` candidates of a step, `k` tokens that run it, `h` hidden.
"""

from dataclasses import dataclass
from typing import Literal

from mor_layers.costs import ModelShape, StackShape, relaxed_projections

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Kept:
    """How activations are stored and split over ranks."""

    bytes_per_activation: int = 2
    tensor: int = 1
    sequence_parallel: bool = False

    @property
    def shards(self) -> int:
        """Number of tensor-parallel ranks that split the rows between the matrix products."""
        return self.tensor if self.sequence_parallel else 1


def kept_by_layer(shape: ModelShape, stack: StackShape, tokens: float, how: Kept) -> float:
    """Bytes that one layer keeps for `tokens` rows, on one tensor-parallel rank.

    Recomputation of the core attention does not change this. It avoids storing the scores, which
    `scaled_dot_product_attention` does not store anyway.
    """
    h, mlp, item = shape.hidden_size, stack.mlp, how.bytes_per_activation
    # Both norms save their input in fp32, and their values before and after the weight.
    rows = 2 * 4 * h + item * 4 * h
    if stack.sandwich_norms:  # their outputs are only added, and a sum saves nothing
        rows += 2 * 4 * h + item * 2 * h
    if stack.norm_modulation is not None:  # two norms: the factor, the result, and the signal
        rows += 2 * item * (2 * h + 2 * stack.norm_modulation.rank_of(h))
    heads = item * _heads(shape)
    latent = shape.latent
    if latent is not None:
        rows += (4 + 2 * item) * latent.norm_weights  # of both kinds of latent rows
        # A rank's part of gathered rows is a view, which keeps all of them: the inputs of these norms,
        # and that of the projection to keys and values.
        gathered = latent.query_rank + latent.row_size + latent.rank
        rows += item * gathered * (how.shards - 1)
    widths = mlp.experts_per_token * mlp.ffn_hidden_size + mlp.shared_ffn_hidden_size
    inner = item * (5 if mlp.gated else 2) * widths
    if mlp.num_experts:  # inputs and outputs of the experts
        rows += item * 2 * h * mlp.experts_per_token
    return tokens * (
        rows / how.shards + (heads + inner) / how.tensor + _kept_by_deltas(shape, stack, how)
    )


def _heads(shape: ModelShape) -> int:
    """Numbers per token that attention keeps of all heads."""
    latent = shape.latent
    if latent is None:
        # Queries, the result, rotated keys, and the fused projection that values are a view of.
        return 3 * shape.query_size + 3 * shape.kv_size
    # Queries, keys, the result, and the projected latent rows that values are a view of.
    return 2 * shape.query_size + latent.value_size + latent.raised_size


def _kept_by_deltas(shape: ModelShape, stack: StackShape, how: Kept) -> float:
    """Bytes per token in one layer: outputs of `A`, and inputs of the `dora` magnitudes."""
    relaxation, numbers = stack.relaxation, 0.0
    for name, (into, out) in relaxed_projections(shape, stack).items():
        assert relaxation is not None
        is_row_parallel = name in ("output", "down")
        numbers += relaxation.rank_of(into, out) / (how.shards if is_row_parallel else 1)
        if relaxation.kind == "dora":
            numbers += out / (how.shards if is_row_parallel else how.tensor)
    return how.bytes_per_activation * numbers


def kept_by_routing(
    shape: ModelShape, stack: StackShape, step: int, candidates: float, tokens: float, how: Kept
) -> float:
    """Bytes that a step keeps in addition to its layers.

    These are the fp32 states that the router scored, the block's output, the recursion's input if the
    step adds it, the input of the norm between steps, the residual streams that the step mixes, and
    the differences of states that it injects or gates.
    """
    has_scorer = stack.router is not None and any(stack.router.scorers)
    scored = 4 * candidates if has_scorer and how.bytes_per_activation < 4 else 0
    combined = how.bytes_per_activation * tokens if stack.router is not None else 0
    injected = how.bytes_per_activation * tokens if stack.input_injection and step else 0
    # The norm keeps its input in fp32.
    normed = 4 * tokens if stack.loop_norm and step else 0
    mixed = _kept_by_streams(stack, how.bytes_per_activation) * tokens
    differences = 0
    if stack.history is not None:
        seen = min(stack.history.window, max(step - 1, 0))
        differences = how.bytes_per_activation * tokens * (seen + stack.history.step_gate)
    kept = scored + combined + injected + normed + mixed + differences
    return kept * shape.hidden_size / how.shards


def _kept_by_streams(stack: StackShape, item: int) -> float:
    """Bytes per token and per number of a state.

    These are the streams, the output that they take in, and, where mixing depends on them, twice the
    streams in fp32 and normalised.
    """
    given = stack.hyper_connections
    if given is None:
        return 0
    normed = 0 if given.mixing == "static" else 2 * (4 + (4 if item < 4 else 0))
    return item * (given.streams + 1) + normed * given.streams


def kept_by_output(shape: ModelShape, length: float, how: Kept) -> float:
    """Bytes that the final norm and the loss keep. The loss keeps probabilities in fp32."""
    rows = (4 + 2 * how.bytes_per_activation) * shape.hidden_size
    return length * (rows / how.shards + 4 * shape.vocab_size / how.tensor)


def kept_input(shape: ModelShape, tokens: float, how: Kept) -> float:
    """Bytes of the input states, which full recomputation keeps for a layer or a recursion."""
    return tokens * shape.hidden_size * how.bytes_per_activation / how.shards
