"""The cost of a model, computed from its settings alone: parameters, FLOPs and key-value bytes.

Legend: `s` sequence, `n` candidates of a step, `k` tokens that run it, `m` tokens whose keys they
see, `h` hidden, `r` recursion step. All counts are for one sequence.

Only the FLOPs of matrix products are counted, `2 · rows · inner · columns`, as
`torch.utils.flop_counter` does: 2 FLOPs per token and weight, and `4 · k · m · query size` for
attention, including masked pairs; where heads of values have another size, `2 · k · m · (query size +
value size)`. Each product becomes two in the backward pass, one per factor.
Norms, activations, rotary embeddings, softmax and activation recomputation are not counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, pairwise
from typing import Self

from mor_layers.costs.shapes import ModelShape, StackShape
from mor_layers.layers import Projection
from mor_layers.models import DecoderConfig
from mor_layers.selection import capacity


@dataclass(frozen=True)
class Parts:
    """Parameters or FLOPs by part of the model; they sum to `total`."""

    embedding: float = 0
    norms: float = 0
    projections: float = 0
    """The projections to queries, keys and values, and the output projection of attention."""
    attention: float = 0
    """Attention scores and the weighted sum of values. These have no parameters."""
    mlp: float = 0
    """Dense MLPs and experts: the parameters of all experts, the FLOPs of the activated ones."""
    deltas: float = 0
    """What makes steps differ: low-rank deltas, input vectors, modulated norms, history, and the mixing
    of residual streams."""
    expert_router: float = 0
    depth_router: float = 0
    output: float = 0
    """Logits over the vocabulary. They have no parameters if tied to the embedding."""

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class StepAccount:
    """One run of a stack on `tokens` (k) tokens, which add `kv_numbers` numbers to the cache."""

    stack: str
    tokens: float
    forward: Parts
    backward: Parts
    kv_numbers: float
    trained: float = 1.0
    """Share of the runs in training that gradients go through; `backward` is the mean over all runs."""
    seen: float = 0
    """Number of tokens whose keys and values the run attends to, its own included."""


@dataclass(frozen=True)
class Accounting:
    """The cost of a model for one sequence. For a batch, multiply FLOPs and bytes by its size."""

    sequence_length: int
    parameters: Parts
    steps: tuple[StepAccount, ...]
    """Every run of every stack in order, including prelude and coda. Together with the output matrix
    they add up to `forward` and `backward`."""
    forward: Parts
    backward: Parts
    once: float = 0
    """FLOPs per forward pass that do not depend on the batch, for the row norms of weights with
    `dora` deltas. They are not part of `forward`."""
    further_losses: tuple[Parts, Parts] = (Parts(), Parts())
    """FLOPs, forward and backward, of losses after all loops but the last, and of the heads of
    multi-token prediction, which only training has."""

    @property
    def training(self) -> Parts:
        """FLOPs of the forward and backward pass."""
        return sum(self.further_losses, self.forward + self.backward)

    def flops_per_token(self, training: bool = True) -> float:
        """FLOPs per token of the forward and backward pass, or of the forward pass alone."""
        return (self.training if training else self.forward).total / self.sequence_length

    def kv_bytes(self, bytes_per_number: int = 2) -> float:
        """Bytes of the key-value cache of a whole sequence, as generation stores it.

        Each layer of a recursion stores Σ k_r rows, also with `sharing_with_update`, which keeps the
        rows that each step computes. `recursive_sharing` stores only k_1 rows, and `exit_state` one
        more row for each token that exits early.
        """
        return bytes_per_number * sum(step.kv_numbers for step in self.steps)


def account(
    model: ModelShape | DecoderConfig,
    sequence_length: int,
    tokens_per_step: Sequence[float] | None = None,
    causal_half: bool = False,
    recomputes_scores: bool = False,
) -> Accounting:
    """Count the parameters, FLOPs and key-value bytes of a model.

    Args:
        tokens_per_step: number of tokens that run each step of the routed stacks, in order of
            execution, including padding slots. Required if the settings do not determine them, as
            for token choice. Default: what `selection.capacity` makes of the capacity factors. The cost
            of attention is quadratic in these numbers, so passing means over sequences can
            underestimate it.
        causal_half: count only half of the k · m pairs of attention, not all of them as the formula
            of `scaled_dot_product_attention` does. This is a lower bound for kernels that skip
            masked blocks.
        recomputes_scores: include the scores that a fused kernel recomputes in the backward pass, as
            flop_counter does for FlashAttention. Model FLOPs (as in MFU) do not include them.

    Raises:
        ValueError: `tokens_per_step` is missing, has the wrong length, increases, or exceeds `s`.
    """
    shape = model if isinstance(model, ModelShape) else ModelShape.from_decoder(model)
    h, steps = shape.hidden_size, []
    for stack, step, n, k, first in _runs(shape, sequence_length, tokens_per_step):
        layers, mlp = stack.num_layers, stack.mlp
        projected, m = {  # number of tokens whose keys are computed, and whose keys are seen
            "recursion_wise": (k, k),
            "recursive_sharing": (0 if step else k, first),
            "sharing_with_update": (k, first),
            "exit_state": (n, sequence_length),  # candidates run the step or exit before it
        }[stack.kv_policy]
        attention = _AttentionWeights.of(shape)
        kv_numbers = layers * projected * shape.kept_size
        pairs = layers * k * m * (1 if causal_half else 2)
        scores, sums = pairs * shape.query_size, pairs * shape.value_size
        scorer = stack.router.scorers[step] if stack.router else ()
        forward = Parts(
            projections=2
            * layers
            * (k * attention.running + projected * attention.kept + m * attention.seen),
            attention=scores + sums,
            mlp=layers * 2 * k * mlp.weights(h, mlp.experts_per_token),
            expert_router=layers * 2 * k * h * (mlp.num_experts or 0),
            depth_router=2 * n * sum(matrix.weights for matrix in scorer),
            deltas=layers * 2 * _delta_products(shape, stack, k, projected)
            + 2 * k * (stack.mixing_weights(h) + stack.adapter * 2 * h * h)
            + layers * 2 * k * stack.modulation_weights(h),
        )
        backward = replace(
            forward + forward,
            attention=(3 if recomputes_scores else 2) * scores + 2 * sums,
            depth_router=2 * n * sum(x.weights * x.backward_products for x in scorer),
        )
        shares = stack.router.trained_shares if stack.router else None
        trained = 1.0 if shares is None else shares[step]
        if trained < 1:
            backward = _times(trained, backward)
        steps.append(StepAccount(stack.name, k, forward, backward, kv_numbers, trained, m))
    head = 2 * sequence_length * h * shape.vocab_size
    forward = sum((step.forward for step in steps), Parts(output=head))
    backward = sum((step.backward for step in steps), Parts(output=2 * head))
    parameters, once = count_parameters(shape), _norms_of_relaxed_weights(shape)
    ends = [step for step in steps if step.stack == "coda"]
    further = (
        _times(shape.num_losses - 1, sum((step.forward for step in ends), Parts(output=head))),
        _times(shape.num_losses - 1, sum((step.backward for step in ends), Parts(output=2 * head))),
    )
    for stack in shape.heads:
        alone = replace(shape, stacks=(stack,), heads=(), num_losses=1)
        own = account(alone, sequence_length, None, causal_half, recomputes_scores)
        joining = Parts(projections=2 * sequence_length * 2 * h * h)
        further = (
            further[0] + own.forward + joining,
            further[1] + own.backward + joining + joining,
        )
    return Accounting(sequence_length, parameters, tuple(steps), forward, backward, once, further)


def _times(factor: float, parts: Parts) -> Parts:
    return Parts(*(factor * getattr(parts, f.name) for f in fields(parts)))


@dataclass(frozen=True)
class _AttentionWeights:
    """Weights of the projections of a layer's attention, by what they are multiplied by."""

    running: int
    """Tokens that run a step: queries and output."""
    kept: int
    """Tokens whose rows are projected."""
    seen: int
    """Rows that a step sees: the second projection of latent attention."""

    @classmethod
    def of(cls, shape: ModelShape) -> Self:
        h, latent = shape.hidden_size, shape.latent
        output = shape.value_size * h
        if latent is None:
            return cls(h * shape.query_size + output, h * shape.kept_size, 0)
        return cls(latent.query_weights + output, h * shape.kept_size, latent.raising_weights)

    @property
    def total(self) -> int:
        return self.running + self.kept + self.seen


def relaxed_projections(shape: ModelShape, stack: StackShape) -> dict[Projection, tuple[int, int]]:
    """Input and output size of each projection that has deltas."""
    h, width = shape.hidden_size, stack.mlp.ffn_hidden_size
    sizes: dict[Projection, tuple[int, int]] = {
        "query": (h, shape.query_size),
        "key": (h, shape.kv_size),
        "value": (h, shape.kv_size),
        "output": (shape.value_size, h),
        "gate": (h, width),
        "up": (h, width),
        "down": (width, h),
    }
    names = () if stack.relaxation is None else stack.relaxation.projections
    return {name: sizes[name] for name in names}


def _delta_weights(stack: StackShape, into: int, out: int) -> int:
    assert stack.relaxation is not None
    return stack.relaxation.rank_of(into, out) * (into + out)


def _delta_products(shape: ModelShape, stack: StackShape, k: float, projected: float) -> float:
    """Multiplications in one layer. `k` tokens run the step; `projected` ones compute their keys."""
    tokens = {"key": projected, "value": projected}
    sizes = relaxed_projections(shape, stack).items()
    return sum(tokens.get(name, k) * _delta_weights(stack, *size) for name, size in sizes)


def _norms_of_relaxed_weights(shape: ModelShape) -> float:
    flops = 0
    for stack in shape.stacks:
        relaxation = stack.relaxation
        if relaxation is not None and relaxation.kind == "dora":
            sizes = relaxed_projections(shape, stack).values()
            per_layer = sum(2 * i * o * relaxation.rank_of(i, o) for i, o in sizes)
            flops += stack.num_layers * stack.num_recursions * per_layer
    return flops


def _runs(
    shape: ModelShape, s: int, given: Sequence[float] | None
) -> Iterator[tuple[StackShape, int, float, float, float]]:
    """For each run of a stack: the stack, the step, and the number of candidates, of tokens that run
    it, and of tokens that ran the first step."""
    routed = sum(stack.num_recursions for stack in shape.stacks if stack.router)
    if given is not None and len(given) != routed:
        raise ValueError(
            f"tokens_per_step={given} must have {routed} entries, one per routed step."
        )
    rest = iter(given or ())
    for stack in shape.stacks:
        tokens: tuple[float, ...] = (s,) * stack.num_recursions
        if stack.router and given is not None:
            tokens = tuple(islice(rest, stack.num_recursions))
        elif stack.router:
            if stack.router.capacity_factors is None:
                raise ValueError(
                    "the router's settings do not determine how many tokens run each step. Pass "
                    "tokens_per_step."
                )
            multiple = stack.router.capacity_multiple
            tokens = tuple(capacity(c, s, multiple) for c in stack.router.capacity_factors)
        for step, (n, k) in enumerate(pairwise((s, *tokens))):
            if not 0 <= k <= n:
                raise ValueError(f"tokens per step {tokens} must be in 0..{s} and never increase.")
            yield stack, step, n, k, tokens[0]


def count_parameters(shape: ModelShape) -> Parts:
    """Number of parameters. Shared weights count once; buffers such as a loss-free bias do not."""
    h, matrix = shape.hidden_size, shape.vocab_size * shape.hidden_size
    count = Parts(embedding=matrix, norms=h, output=0 if shape.tie_embeddings else matrix)
    biases = shape.query_size + 2 * shape.kv_size if shape.qkv_bias else 0
    latent_norms = 0 if shape.latent is None else shape.latent.norm_weights
    count += Parts(norms=3 * h * len(shape.heads), projections=2 * h * h * len(shape.heads))
    for stack in (*shape.stacks, *shape.heads):
        layers, experts = stack.num_layers, stack.mlp.num_experts
        norms = (
            (4 if stack.sandwich_norms else 2)
            * h
            * (1 if stack.shares_norms else stack.num_recursions)
        )
        attentions = stack.copies("attention")
        projections = _AttentionWeights.of(shape).total + biases
        count += Parts(
            norms=layers * (norms + attentions * (2 * shape.qk_norm_size + latent_norms))
            + h * (stack.loop_norm + stack.exit_norm),
            projections=layers * attentions * projections,
            mlp=layers * stack.copies("mlp") * stack.mlp.weights(h, experts or 1),
            expert_router=layers * h * (experts or 0) * stack.mlp.num_expert_routers,
            depth_router=stack.router.parameters if stack.router else 0,
            deltas=layers * stack.num_recursions * _delta_parameters(shape, stack)
            + stack.input_vectors * h
            + stack.adapter * 2 * h * h
            + stack.num_recursions * stack.mixing_parameters(h)
            + _beside_steps(shape, stack),
        )
    return count


def _beside_steps(shape: ModelShape, stack: StackShape) -> int:
    """Parameters that all steps share and by which they differ: modulated norms and history."""
    h, modulation, history = shape.hidden_size, stack.norm_modulation, stack.history
    norms = 0 if modulation is None else 2 * stack.num_layers * modulation.parameters(h)
    return norms + (0 if history is None else history.parameters(h))


def _delta_parameters(shape: ModelShape, stack: StackShape) -> int:
    """Number of delta parameters of one layer at one step."""
    sizes = relaxed_projections(shape, stack).values()
    has_magnitudes = stack.relaxation is not None and stack.relaxation.kind == "dora"
    return sum(_delta_weights(stack, i, o) + (o if has_magnitudes else 0) for i, o in sizes)


def flop_ratio(
    model: ModelShape | DecoderConfig,
    sequence_length: int,
    baseline: ModelShape | DecoderConfig | None = None,
    tokens_per_step: Sequence[float] | None = None,
    causal_half: bool = False,
) -> float:
    """Training FLOPs relative to `baseline`, by default the plain model of the same depth.

    This is the ratio of training times if only arithmetic took time. The other arguments are those
    of `account`.
    """
    shape = model if isinstance(model, ModelShape) else ModelShape.from_decoder(model)
    cost = account(shape, sequence_length, tokens_per_step, causal_half)
    whole = account(baseline or shape.plain(), sequence_length, causal_half=causal_half)
    return cost.flops_per_token() / whole.flops_per_token()


def table(accounts: Mapping[str, Accounting]) -> list[dict[str, str]]:
    """One row to print per model, from column names to texts. Ratios are relative to the first."""
    rows = []
    for name, cost in accounts.items():
        first = next(iter(accounts.values()))
        kv, first_kv = (a.kv_bytes(1) / a.sequence_length for a in (cost, first))
        rows.append(
            {
                "model": name,
                "parameters (M)": f"{cost.parameters.total / 1e6:.1f}",
                "tokens per step": " ".join(f"{step.tokens:g}" for step in cost.steps),
                "forward (MFLOP/token)": f"{cost.flops_per_token(training=False) / 1e6:.1f}",
                "training (MFLOP/token)": f"{cost.flops_per_token() / 1e6:.1f}",
                "FLOP ratio": f"{cost.flops_per_token() / first.flops_per_token():.3f}",
                "KV (numbers/token)": f"{kv:.0f}",
                "KV ratio": f"{kv / first_kv:.3f}",
            }
        )
    return rows
