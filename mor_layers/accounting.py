"""What a model costs: parameters, FLOPs and key-value bytes, from its settings alone.

Legend: `s` sequence, `n` candidates of a step, `k` tokens that run it, `m` tokens whose keys they
see, `h` hidden, `r` recursion step. Counts are of one sequence.

FLOPs are those of matrix products, `2 · rows · inner · columns`, as `torch.utils.flop_counter`
counts them: 2 for each weight a token meets, and `4 · k · m · query size` for attention, masked
pairs included. In the backward pass each product becomes two, one for either factor. Norms,
activations, rotations, softmax and what recomputation runs again are not counted.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, pairwise
from typing import Self

from mor_layers.attention import KVPolicy
from mor_layers.config import DecoderConfig, RecursionConfig
from mor_layers.relaxation import Projection, Relaxation
from mor_layers.routers import (
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    RandomDepth,
    RandomLoops,
    TokenChoice,
)


@dataclass(frozen=True)
class MLPShape:
    """An MLP, or a mixture of experts that drops no token."""

    ffn_hidden_size: int
    """Width of the MLP, or of one expert."""
    gated: bool = True
    """SwiGLU and its like, three matrices; otherwise two."""
    num_experts: int | None = None
    """Routed experts; None: a dense MLP without a router."""
    experts_per_token: float = 1
    """Routed experts that each token takes; the mean where their number varies."""
    num_expert_routers: int = 1
    """Routers over the experts: one, or one a step."""
    shared_ffn_hidden_size: int = 0
    """Width of the expert that every token takes beside them. 0: none."""

    def __post_init__(self) -> None:
        top_k, experts = self.experts_per_token, self.num_experts or 1
        if not 1 <= top_k <= experts:
            raise ValueError(f"experts_per_token={top_k} must lie in 1..{experts} (num_experts).")

    @classmethod
    def of_layer(cls, config: DecoderConfig, recursion: RecursionConfig | None = None) -> Self:
        """What follows attention in a `MoRTransformer`: in its recursion, or outside of it."""
        moe = config.moe
        if moe is None:
            return cls(config.ffn_hidden_size)
        width, per_token, routers = moe.ffn_hidden_size, float(moe.experts_per_token), 1
        if recursion is not None and recursion.num_recursions > 1:
            per_token = recursion.mean_experts[0] if recursion.mean_experts else per_token
            routers = recursion.num_recursions if recursion.expert_routers == "per_step" else 1
        return cls(width or config.ffn_hidden_size, True, moe.num_experts, per_token, routers)

    def weights(self, hidden_size: int, experts: float) -> float:
        """Weights of so many experts and the shared one."""
        width = experts * self.ffn_hidden_size + self.shared_ffn_hidden_size
        return (3 if self.gated else 2) * hidden_size * width


@dataclass(frozen=True)
class ScorerMatrix:
    """One matrix of a router, of so many weights."""

    weights: int
    backward_products: int = 2
    """Its products in the backward pass: 1 if its input is detached, 0 if no gradient arrives."""


@dataclass(frozen=True)
class RouterShape:
    """A router over depth."""

    scorers: tuple[tuple[ScorerMatrix, ...], ...]
    """At each step, the matrices that all its candidates meet."""
    capacity_factors: tuple[float, ...] | None = None
    """Share of the sequence that runs each step; None where the settings do not fix it."""
    num_biases: int = 0
    """Biases of logits."""

    @classmethod
    def from_recursion(cls, config: RecursionConfig, hidden_size: int) -> Self | None:
        """The shape of a built-in router; None for FixedDepth, which has nothing to count."""
        router, steps = config.router, config.num_recursions
        factors = router.capacity_factors_for(steps)
        if isinstance(router, FixedDepth | RandomDepth | RandomLoops):
            return None if isinstance(router, FixedDepth) else cls(((),) * steps, factors)
        if isinstance(router, DepthAndWidth):
            h, out = hidden_size, steps - 1
            weights = (h * out,) if router.architecture == "linear" else (2 * h * h, 2 * h * out)
            scorer = tuple(ScorerMatrix(w) for w in weights)
            return cls((scorer, *((),) * (steps - 1)), factors)
        if not isinstance(router, ExpertChoice | TokenChoice):
            raise ValueError(f"{type(router).__name__} is not built in: give its RouterShape too.")
        h, logits = hidden_size, 1 if isinstance(router, ExpertChoice) else steps
        weights = (h * logits,) if router.architecture == "linear" else (2 * h * h, 2 * h * logits)
        scorer = tuple(ScorerMatrix(w) for w in weights)
        if isinstance(router, ExpertChoice):
            if router.predictor == "aux_router":  # a twin that reads detached states
                scorer += (ScorerMatrix(weights[0], 1), *scorer[1:])
            return cls((scorer,) * steps, factors, 0 if router.gate_bias is None else steps)
        has_loss = router.balancing == "loss" or router.z_loss_coefficient > 0
        if router.combine == "additive" and not has_loss:  # nothing reads the gate
            scorer = tuple(ScorerMatrix(w, 0) for w in weights)
        biases = 0 if router.gate_bias is None else steps
        return cls((scorer, *((),) * (steps - 1)), factors, biases)


@dataclass(frozen=True)
class StackShape:
    """Layers that run one after another, all of them `num_recursions` times."""

    name: str
    """For the reader, such as `prelude`."""
    num_layers: int
    """Layers of weights."""
    mlp: MLPShape
    """What follows attention in each layer."""
    num_recursions: int = 1
    """Times the stack runs (paper: N_r)."""
    router: RouterShape | None = None
    """Who runs each step; None: every token."""
    kv_policy: KVPolicy = "recursion_wise"
    """Keys and values at later steps."""
    shares_norms: bool = True
    """Whether the steps share norm weights."""
    relaxation: Relaxation | None = None
    """Low-rank deltas of each step."""
    step_embeddings: bool = False
    """Whether each step adds a vector to its input."""
    input_injection: bool = False
    """Whether each step but the first adds the recursion's input, times a vector."""
    sandwich_norms: bool = False
    """Whether norms also follow attention and MLP."""

    def __post_init__(self) -> None:
        router = self.router or RouterShape(((),) * self.num_recursions)
        for entries in (router.scorers, router.capacity_factors):
            if entries is not None and len(entries) != self.num_recursions:
                raise ValueError(f"{entries} must have {self.num_recursions} entries, one a step.")

    @property
    def input_vectors(self) -> int:
        """Vectors that steps add to their input, or multiply the recursion's input with."""
        steps = self.num_recursions
        return steps * self.step_embeddings + (steps - 1) * self.input_injection


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer as far as its cost depends on it: RMSNorm."""

    vocab_size: int
    """Rows of the embedding, padding included."""
    hidden_size: int
    """Width of the residual stream (h)."""
    query_size: int
    """Numbers of a token's queries in one layer: query heads times head size."""
    kv_size: int
    """Numbers of a token's keys in one layer, as many as of its values."""
    stacks: tuple[StackShape, ...]
    """All layers, in order of execution."""
    tie_embeddings: bool = False
    """Whether input and output embeddings are one matrix."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases; no others are counted."""
    qk_norm_size: int = 0
    """Weights of the norm of queries, and of that of keys, in one layer. 0: none."""

    @classmethod
    def from_decoder(cls, config: DecoderConfig, router: RouterShape | None = None) -> Self:
        """The shape of a `MoRTransformer`; `router` only where it is one of your own."""
        recursion, schedule = config.effective_recursion, config.schedule
        router = router or RouterShape.from_recursion(recursion, config.hidden_size)
        block, mlp = MLPShape.of_layer(config, recursion), MLPShape.of_layer(config)
        mlp = MLPShape(config.ffn_hidden_size) if config.dense_ends else mlp
        how = recursion.num_recursions, router, recursion.kv_policy, recursion.share_norms
        how += recursion.relaxation, recursion.step_embeddings, recursion.input_injection
        how += (recursion.sandwich_norms,)
        # A cyclic step runs the whole block; in a sequence each layer repeats on its own.
        sizes = (schedule.block_size,) if schedule.is_cyclic else (1,) * schedule.block_size
        stacks = (
            *(StackShape("prelude", 1, mlp),) * schedule.prelude,
            *(StackShape("block", n, block, *how) for n in sizes),
            *(StackShape("coda", 1, mlp),) * schedule.coda,
        )
        return cls(
            config.vocab_size,
            config.hidden_size,
            config.num_heads * config.head_size,
            config.kv_heads * config.head_size,
            stacks,
            config.tie_embeddings,
            config.qkv_bias,
            config.head_size if config.qk_norm else 0,
        )

    def plain(self) -> Self:
        """The model without recursion that is as deep: every repeat has weights of its own."""
        stacks = (StackShape(s.name, s.num_layers * s.num_recursions, s.mlp) for s in self.stacks)
        return replace(self, stacks=tuple(stacks))


@dataclass(frozen=True)
class Parts:
    """Parameters or FLOPs by part of the model; they sum to `total`."""

    embedding: float = 0
    norms: float = 0
    projections: float = 0
    """Queries, keys, values, and attention's output."""
    attention: float = 0
    """Scores, and the weighted sum of values; no parameters."""
    mlp: float = 0
    """Dense MLPs and experts: parameters of all, FLOPs of those that tokens take."""
    deltas: float = 0
    """What single steps add to the weights they share."""
    expert_router: float = 0
    depth_router: float = 0
    output: float = 0
    """Logits over the vocabulary; no parameters where tied to the embedding."""

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class StepAccount:
    """One run of a stack by `tokens` (k) tokens, which add `kv_numbers` to the cache."""

    stack: str
    tokens: float
    forward: Parts
    backward: Parts
    kv_numbers: float


@dataclass(frozen=True)
class Accounting:
    """What a model costs for one sequence: multiply by the batch."""

    sequence_length: int
    parameters: Parts
    steps: tuple[StepAccount, ...]
    """Every run of every stack in order, prelude and coda too. With the output they are all."""
    forward: Parts
    backward: Parts
    once: float = 0
    """FLOPs of a forward pass whatever the batch, beside all others: norms of the rows that `dora`
    deltas make."""

    @property
    def training(self) -> Parts:
        """FLOPs forward and backward."""
        return self.forward + self.backward

    def flops_per_token(self, training: bool = True) -> float:
        """FLOPs of training, or of the forward pass alone."""
        return (self.training if training else self.forward).total / self.sequence_length

    def kv_bytes(self, bytes_per_number: int = 2) -> float:
        """Bytes of a whole sequence's key-value cache, as generation stores it.

        Rows per layer of a recursion: Σ k_r, since `sharing_with_update` too keeps what each step
        computes; `recursive_sharing` k_1 only; `exit_state` one more for each token that exits.
        """
        return bytes_per_number * sum(step.kv_numbers for step in self.steps)


def account(
    model: ModelShape | DecoderConfig,
    sequence_length: int,
    tokens_per_step: Sequence[float] | None = None,
    causal_half: bool = False,
    recomputes_scores: bool = False,
) -> Accounting:
    """Count everything.

    Args:
        tokens_per_step: tokens that run each step of the routed stacks, in order of execution,
            padding slots included. Needed where settings do not fix them (token-choice); elsewhere
            instead of `max(1, floor(c_r · s))`. Attention squares them, means too.
        causal_half: count half of attention's k · m pairs, not all that the formula of
            `scaled_dot_product_attention` has: a limit for kernels that skip masked blocks.
        recomputes_scores: count what a fused kernel computes again in the backward pass, as
            flop_counter does for FlashAttention. Model FLOPs (MFU) leave it out.

    Raises:
        ValueError: `tokens_per_step` is missing, has another length, rises, or exceeds `s`.
    """
    shape = model if isinstance(model, ModelShape) else ModelShape.from_decoder(model)
    h, steps = shape.hidden_size, []
    for stack, step, n, k, first in _runs(shape, sequence_length, tokens_per_step):
        layers, mlp = stack.num_layers, stack.mlp
        projected, m = {  # tokens whose keys are computed, and tokens whose keys are seen
            "recursion_wise": (k, k),
            "recursive_sharing": (0 if step else k, first),
            "sharing_with_update": (k, first),
            "exit_state": (n, sequence_length),  # candidates run the step or exit before it
        }[stack.kv_policy]
        kv_numbers = layers * 2 * projected * shape.kv_size
        product = layers * k * m * shape.query_size * (1 if causal_half else 2)
        scorer = stack.router.scorers[step] if stack.router else ()
        forward = Parts(
            projections=2 * h * (layers * 2 * k * shape.query_size + kv_numbers),
            attention=2 * product,  # scores, and the weighted sum of values
            mlp=layers * 2 * k * mlp.weights(h, mlp.experts_per_token),
            expert_router=layers * 2 * k * h * (mlp.num_experts or 0),
            depth_router=2 * n * sum(matrix.weights for matrix in scorer),
            deltas=layers * 2 * _delta_products(shape, stack, k, projected),
        )
        backward = replace(
            forward + forward,
            attention=(5 if recomputes_scores else 4) * product,
            depth_router=2 * n * sum(x.weights * x.backward_products for x in scorer),
        )
        steps.append(StepAccount(stack.name, k, forward, backward, kv_numbers))
    head = 2 * sequence_length * h * shape.vocab_size
    forward = sum((step.forward for step in steps), Parts(output=head))
    backward = sum((step.backward for step in steps), Parts(output=2 * head))
    parameters, once = count_parameters(shape), _norms_of_relaxed_weights(shape)
    return Accounting(sequence_length, parameters, tuple(steps), forward, backward, once)


def relaxed_projections(shape: ModelShape, stack: StackShape) -> dict[Projection, tuple[int, int]]:
    """Inputs and outputs of each projection that has deltas."""
    h, width = shape.hidden_size, stack.mlp.ffn_hidden_size
    sizes: dict[Projection, tuple[int, int]] = {
        "query": (h, shape.query_size),
        "key": (h, shape.kv_size),
        "value": (h, shape.kv_size),
        "output": (shape.query_size, h),
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
    """Multiplications in one layer, for `k` tokens and those whose keys are `projected`."""
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
    """Each run of a stack: its step, its candidates, the tokens that run it and the first step."""
    routed = sum(stack.num_recursions for stack in shape.stacks if stack.router)
    if given is not None and len(given) != routed:
        raise ValueError(f"tokens_per_step={given} must have {routed} entries, one a routed step.")
    rest = iter(given or ())
    for stack in shape.stacks:
        tokens: tuple[float, ...] = (s,) * stack.num_recursions
        if stack.router and given is not None:
            tokens = tuple(islice(rest, stack.num_recursions))
        elif stack.router:
            if stack.router.capacity_factors is None:
                raise ValueError("the router may keep any share of tokens. Give tokens_per_step.")
            tokens = tuple(max(1, math.floor(c * s)) for c in stack.router.capacity_factors)
        for step, (n, k) in enumerate(pairwise((s, *tokens))):
            if not 0 <= k <= n:
                raise ValueError(f"tokens per step {tokens} must not rise, nor leave 0..{s}.")
            yield stack, step, n, k, tokens[0]


def count_parameters(shape: ModelShape) -> Parts:
    """Parameters, each shared weight once; buffers, such as a loss-free bias, are none."""
    h, matrix = shape.hidden_size, shape.vocab_size * shape.hidden_size
    count = Parts(embedding=matrix, norms=h, output=0 if shape.tie_embeddings else matrix)
    biases = shape.query_size + 2 * shape.kv_size if shape.qkv_bias else 0
    for stack in shape.stacks:
        layers, experts = stack.num_layers, stack.mlp.num_experts
        scorers = stack.router.scorers if stack.router else ()
        norms = (
            (4 if stack.sandwich_norms else 2)
            * h
            * (1 if stack.shares_norms else stack.num_recursions)
        )
        count += Parts(
            norms=layers * (norms + 2 * shape.qk_norm_size),
            projections=layers * (2 * h * (shape.query_size + shape.kv_size) + biases),
            mlp=layers * stack.mlp.weights(h, experts or 1),
            expert_router=layers * h * (experts or 0) * stack.mlp.num_expert_routers,
            depth_router=sum(matrix.weights for scorer in scorers for matrix in scorer)
            + (stack.router.num_biases if stack.router else 0),
            deltas=layers * stack.num_recursions * _delta_parameters(shape, stack)
            + stack.input_vectors * h,
        )
    return count


def _delta_parameters(shape: ModelShape, stack: StackShape) -> int:
    """Of one layer at one step."""
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
    """Training FLOPs over those of `baseline`, by default the plain model that is as deep.

    It is the time ratio that arithmetic alone allows. Other arguments as for `account`.
    """
    shape = model if isinstance(model, ModelShape) else ModelShape.from_decoder(model)
    cost = account(shape, sequence_length, tokens_per_step, causal_half)
    whole = account(baseline or shape.plain(), sequence_length, causal_half=causal_half)
    return cost.flops_per_token() / whole.flops_per_token()


def table(accounts: Mapping[str, Accounting]) -> list[dict[str, str]]:
    """Rows to print, column name to text, one for each account; ratios are to the first."""
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
