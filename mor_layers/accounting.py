"""What a model costs: parameters, FLOPs and key-value bytes, from its settings alone.

Legend: `s` sequence, `n` candidates of a step, `k` tokens that run it, `m` tokens whose keys they
see, `h` hidden, `r` recursion step. Counts are of one sequence.

FLOPs are those of matrix products, `2 · rows · inner · columns`, as `torch.utils.flop_counter`
counts them: 2 for each weight a token meets, and `4 · k · m · query size` for attention, masked
pairs included. In the backward pass each product becomes two, one for either factor. Norms,
activations, rotations and softmax are not counted, nor activations that are computed again.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, pairwise
from typing import Self

from mor_layers.attention import KVPolicy
from mor_layers.config import DecoderConfig, RecursionConfig
from mor_layers.routers import ExpertChoice, FixedDepth, RandomDepth, TokenChoice


@dataclass(frozen=True)
class MLPShape:
    """An MLP, or a mixture of experts that drops no token."""

    ffn_hidden_size: int
    """Width of the MLP, or of one expert."""
    gated: bool = True
    """SwiGLU and its like, three matrices; otherwise two."""
    num_experts: int | None = None
    """Routed experts; None: a dense MLP without a router."""
    experts_per_token: int = 1
    """Routed experts that each token takes."""
    shared_ffn_hidden_size: int = 0
    """Width of the expert that every token takes beside them. 0: none."""

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= (self.num_experts or 1):
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must lie between 1 and "
                f"num_experts={self.num_experts}, and be 1 without experts."
            )

    def weights(self, hidden_size: int, experts: int) -> int:
        """Weights of so many experts and the shared one."""
        width = experts * self.ffn_hidden_size + self.shared_ffn_hidden_size
        return (3 if self.gated else 2) * hidden_size * width


@dataclass(frozen=True)
class ScorerMatrix:
    """One matrix of a router."""

    weights: int
    """Rows times columns."""
    backward_products: int = 2
    """Its products in the backward pass: 1 if its input is detached, 0 if no gradient arrives."""


@dataclass(frozen=True)
class RouterShape:
    """A router over depth."""

    scorers: tuple[tuple[ScorerMatrix, ...], ...]
    """At each step, the matrices that all its candidates meet."""
    capacity_factors: tuple[float, ...] | None = None
    """Share of the sequence that runs each step; None where the settings do not fix it."""

    @classmethod
    def from_recursion(cls, config: RecursionConfig, hidden_size: int) -> Self | None:
        """The shape of a built-in router; None for FixedDepth, which has nothing to count."""
        router, steps = config.router, config.num_recursions
        factors = router.capacity_factors_for(steps)
        if isinstance(router, FixedDepth):
            return None
        if isinstance(router, RandomDepth):
            return cls(((),) * steps, factors)
        if not isinstance(router, ExpertChoice | TokenChoice):
            raise ValueError(
                f"the matrices of {type(router).__name__} are not known. Describe them: "
                "ModelShape.from_decoder(config, router=RouterShape(...))."
            )

        def scorer(logits: int, first: int = 2, last: int = 2) -> tuple[ScorerMatrix, ...]:
            if router.architecture == "linear":
                return (ScorerMatrix(hidden_size * logits, first),)
            wide = 2 * hidden_size
            return ScorerMatrix(hidden_size * wide, first), ScorerMatrix(wide * logits, last)

        if isinstance(router, ExpertChoice):  # a predictor reads detached states
            predictor = scorer(1, first=1) if router.predictor == "aux_router" else ()
            return cls((scorer(1) + predictor,) * steps, factors)
        # An additive combination does not read the gate: only losses then teach the scorer.
        reads_gate = router.combine == "weighted"
        learns = reads_gate or router.balancing == "loss" or router.z_loss_coefficient > 0
        products = 2 if learns else 0
        return cls((scorer(steps, products, products), *((),) * (steps - 1)), factors)


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

    def __post_init__(self) -> None:
        router, steps = self.router, self.num_recursions
        if (
            router
            and not len(router.scorers) == len(router.capacity_factors or "x" * steps) == steps
        ):
            raise ValueError(f"{router} needs one entry for each of num_recursions={steps} steps.")


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer as far as its cost depends on it: RMSNorm, no biases."""

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

    @classmethod
    def from_decoder(cls, config: DecoderConfig, router: RouterShape | None = None) -> Self:
        """The shape of a `MoRTransformer`; `router` only where it is one of your own."""
        recursion = config.recursion or RecursionConfig(1, sharing="cycle")
        schedule = recursion.schedule(config.num_unrolled_layers)
        router = router or RouterShape.from_recursion(recursion, config.hidden_size)
        mlp, steps = MLPShape(config.ffn_hidden_size), recursion.num_recursions
        policy, shares_norms = recursion.kv_policy, recursion.share_norms
        # A cyclic step runs the whole block; in a sequence each layer repeats on its own.
        sizes = (schedule.block_size,) if schedule.is_cyclic else (1,) * schedule.block_size
        stacks = (
            *(StackShape("prelude", 1, mlp),) * schedule.prelude,
            *(StackShape("block", k, mlp, steps, router, policy, shares_norms) for k in sizes),
            *(StackShape("coda", 1, mlp),) * schedule.coda,
        )
        h, kv_size = config.hidden_size, config.kv_heads * config.head_size
        return cls(config.vocab_size, h, h, kv_size, stacks, config.tie_embeddings)

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
    """One run of one stack."""

    stack: str
    """The stack's name."""
    tokens: float
    """Tokens of a sequence that run it (k)."""
    forward: Parts
    backward: Parts
    kv_numbers: float
    """Numbers that all its layers add to the key-value cache."""


@dataclass(frozen=True)
class Accounting:
    """What a model costs for one sequence: multiply by the batch."""

    sequence_length: int
    parameters: Parts
    steps: tuple[StepAccount, ...]
    """Every run of every stack in order, prelude and coda too. With the output they are all."""
    forward: Parts
    backward: Parts

    @property
    def training(self) -> Parts:
        """FLOPs forward and backward."""
        return self.forward + self.backward

    @property
    def flops_per_token(self) -> tuple[float, float]:
        """Of the forward pass, and of training."""
        return self.forward.total / self.sequence_length, self.training.total / self.sequence_length

    def kv_bytes(self, bytes_per_number: int = 2) -> float:
        """Bytes of a whole sequence's key-value cache, as generation stores it.

        Rows per layer of a recursion: Σ k_r for `recursion_wise`; k_1 for `recursive_sharing`;
        Σ k_r for `sharing_with_update`, whose recomputed rows stand beside step 1's.
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
            instead of `max(1, floor(c_r · s))`. Of means, attention counts the squared mean.
        causal_half: count half of attention's k · m pairs, not all that `scaled_dot_product_attention`
            formally computes. For limits: a kernel that skips masked blocks comes near it.
        recomputes_scores: count what a fused kernel computes again in the backward pass, as
            flop_counter does for FlashAttention. Model FLOPs (MFU) leave it out.

    Raises:
        ValueError: `tokens_per_step` is missing, has another length, rises, or exceeds `s`.
    """
    shape = model if isinstance(model, ModelShape) else ModelShape.from_decoder(model)
    steps = [
        _step(shape, stack, step, tokens, causal_half, recomputes_scores)
        for stack, tokens in _tokens(shape, sequence_length, tokens_per_step)
        for step in range(stack.num_recursions)
    ]
    head = 2 * sequence_length * shape.hidden_size * shape.vocab_size
    forward = sum((step.forward for step in steps), Parts(output=head))
    backward = sum((step.backward for step in steps), Parts(output=2 * head))
    return Accounting(sequence_length, count_parameters(shape), tuple(steps), forward, backward)


def _tokens(
    shape: ModelShape, s: int, given: Sequence[float] | None
) -> Iterator[tuple[StackShape, tuple[float, ...]]]:
    """Each stack with the candidates of its first step, then the tokens that run each step."""
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
        if not all(0 <= later <= earlier for earlier, later in pairwise((s, *tokens))):
            raise ValueError(f"tokens per step {tokens} must not rise, nor leave 0..{s}.")
        yield stack, (s, *tokens)


def _step(
    shape: ModelShape,
    stack: StackShape,
    step: int,
    tokens: Sequence[float],
    causal_half: bool,
    recomputes_scores: bool,
) -> StepAccount:
    n, k = tokens[step], tokens[step + 1]
    m = k if stack.kv_policy == "recursion_wise" else tokens[1]
    h, layers, mlp = shape.hidden_size, stack.num_layers, stack.mlp
    projects_keys = stack.kv_policy != "recursive_sharing" or step == 0
    kv_size = 2 * shape.kv_size if projects_keys else 0
    # One product over pairs: scores, or the weighted sum of values.
    product = layers * k * m * shape.query_size * (1 if causal_half else 2)
    scorer = stack.router.scorers[step] if stack.router else ()
    forward = Parts(
        projections=layers * 2 * k * h * (2 * shape.query_size + kv_size),
        attention=2 * product,
        mlp=layers * 2 * k * mlp.weights(h, mlp.experts_per_token),
        expert_router=layers * 2 * k * h * (mlp.num_experts or 0),
        depth_router=2 * n * sum(matrix.weights for matrix in scorer),
    )
    backward = replace(
        forward + forward,
        attention=(5 if recomputes_scores else 4) * product,
        depth_router=2 * n * sum(matrix.weights * matrix.backward_products for matrix in scorer),
    )
    return StepAccount(stack.name, k, forward, backward, kv_numbers=layers * k * kv_size)


def count_parameters(shape: ModelShape) -> Parts:
    """Parameters, each shared weight once; buffers, such as a loss-free bias, are none."""
    h, matrix = shape.hidden_size, shape.vocab_size * shape.hidden_size
    count = Parts(embedding=matrix, norms=h, output=0 if shape.tie_embeddings else matrix)
    for stack in shape.stacks:
        layers, mlp = stack.num_layers, stack.mlp
        scorers = stack.router.scorers if stack.router else ()
        count += Parts(
            norms=layers * 2 * h * (1 if stack.shares_norms else stack.num_recursions),
            projections=layers * 2 * h * (shape.query_size + shape.kv_size),
            mlp=layers * mlp.weights(h, mlp.num_experts or 1),
            expert_router=layers * h * (mlp.num_experts or 0),
            depth_router=sum(matrix.weights for scorer in scorers for matrix in scorer),
        )
    return count


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
    return cost.training.total / whole.training.total


def table(accounts: Mapping[str, Accounting]) -> list[dict[str, str]]:
    """Rows to print, column name to text, one for each account; ratios are to the first."""
    rows = []
    for name, cost in accounts.items():
        first = next(iter(accounts.values()))
        kv, first_kv = (a.kv_bytes(1) / a.sequence_length for a in (cost, first))
        forward, training = cost.flops_per_token
        rows.append(
            {
                "model": name,
                "parameters (M)": f"{cost.parameters.total / 1e6:.1f}",
                "tokens per step": " ".join(f"{step.tokens:g}" for step in cost.steps),
                "forward (MFLOP/token)": f"{forward / 1e6:.1f}",
                "training (MFLOP/token)": f"{training / 1e6:.1f}",
                "FLOP ratio": f"{training / first.flops_per_token[1]:.3f}",
                "KV (numbers/token)": f"{kv:.0f}",
                "KV ratio": f"{kv / first_kv:.3f}",
            }
        )
    return rows
