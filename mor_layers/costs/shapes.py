"""The sizes of a model's parts that determine its cost, derived from its settings alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch

from mor_layers.layers import NormModulation, Relaxation, Sublayer
from mor_layers.models import DecoderConfig, RecursionConfig
from mor_layers.recursion import HistoryInjection, HyperConnections, KVPolicy
from mor_layers.routers import ScorerMatrix
from mor_layers.routers.capacity import default_capacity_factors


@dataclass(frozen=True)
class MLPShape:
    """An MLP, or a mixture of experts that drops no token."""

    ffn_hidden_size: int
    """Width of the MLP, or of one expert."""
    gated: bool = True
    """Whether the MLP has three matrices, as SwiGLU does, and not two."""
    num_experts: int | None = None
    """Number of routed experts, or None for a dense MLP without a router."""
    experts_per_token: float = 1
    """Number of routed experts per token, or its mean if it varies."""
    num_expert_routers: int = 1
    """Number of routers over the experts: one, or one per step."""
    shared_ffn_hidden_size: int = 0
    """Width of the shared expert, which runs on every token in addition. 0: none."""

    def __post_init__(self) -> None:
        top_k, experts = self.experts_per_token, self.num_experts or 1
        if not 1 <= top_k <= experts:
            raise ValueError(f"experts_per_token={top_k} must be in 1..{experts} (num_experts).")

    @classmethod
    def of_layer(cls, config: DecoderConfig, recursion: RecursionConfig | None = None) -> Self:
        """The MLP or experts of a `MoRTransformer`'s layers, in `recursion` or outside of it."""
        moe = config.moe
        if moe is None:
            return cls(config.ffn_hidden_size)
        width, per_token, routers = moe.ffn_hidden_size, float(moe.experts_per_token), 1
        if recursion is not None and recursion.num_recursions > 1:
            per_token = recursion.mean_experts[0] if recursion.mean_experts else per_token
            routers = recursion.num_recursions if recursion.expert_routers == "per_step" else 1
        width, shared = width or config.ffn_hidden_size, moe.shared_ffn_hidden_size
        return cls(width, True, moe.num_experts, per_token, routers, shared)

    def weights(self, hidden_size: int, experts: float) -> float:
        """Number of weights of `experts` routed experts and the shared one."""
        width = experts * self.ffn_hidden_size + self.shared_ffn_hidden_size
        return (3 if self.gated else 2) * hidden_size * width


@dataclass(frozen=True)
class RouterShape:
    """A router over depth."""

    scorers: tuple[tuple[ScorerMatrix, ...], ...]
    """For each step, the matrices that all of its candidates are multiplied by."""
    capacity_factors: tuple[float, ...] | None = None
    """Share of the sequence that runs each step, or None if the settings do not determine it."""
    num_parameters: int | None = None
    """Total number of parameters. None: the number of weights of the scorers."""
    trained_shares: tuple[float, ...] | None = None
    """For each step, the share of its runs that gradients go through in training. None: all."""
    capacity_multiple: int = 1
    """What the number of tokens that `capacity_factors` give is rounded up to a multiple of."""

    @classmethod
    def from_recursion(cls, config: RecursionConfig, hidden_size: int) -> Self | None:
        """The shape of a recursion's router, or None if all tokens run all steps at no cost."""
        router, steps = config.router, config.num_recursions
        with torch.device("meta"):
            built = router.build(hidden_size, steps)
        count = sum(parameter.numel() for parameter in built.parameters())
        scorers = router.scorer_shapes(hidden_size, steps)
        factors = router.capacity_factors_for(steps)
        trained = router.trained_shares_for(steps)
        if factors == trained == (1.0,) * steps and not any(scorers) and not count:
            return None
        shares, multiple = (
            None if trained == (1.0,) * steps else trained,
            router.rounds_capacities_to,
        )
        return cls(scorers, factors, count, shares, multiple)

    @property
    def parameters(self) -> int:
        """`num_parameters`, with its default resolved."""
        if self.num_parameters is not None:
            return self.num_parameters
        return sum(matrix.weights for scorer in self.scorers for matrix in scorer)


@dataclass(frozen=True)
class StackShape:
    """Layers that run one after another, `num_recursions` times in total."""

    name: str
    """A name to display, such as `prelude`."""
    num_layers: int
    """Number of layers with weights of their own."""
    mlp: MLPShape
    """The MLP or experts of each layer."""
    num_recursions: int = 1
    """How many times the stack runs (paper: N_r)."""
    router: RouterShape | None = None
    """The router that decides which tokens run each step. None: all tokens run all steps."""
    kv_policy: KVPolicy = "recursion_wise"
    """Which keys and values attention sees at later steps."""
    shares_norms: bool = True
    """Whether all steps use the same norm weights."""
    own_per_step: tuple[Sublayer, ...] = ()
    """The sublayers of which each step has weights of its own."""
    relaxation: Relaxation | None = None
    """The low-rank deltas of each step."""
    step_embeddings: bool = False
    """Whether each step adds a learned vector to its input."""
    loop_norm: bool = False
    """Whether each step except the first normalises its input, with one weight for all of them."""
    input_injection: bool = False
    """Whether each step except the first adds the recursion's input, scaled by a vector."""
    sandwich_norms: bool = False
    """Whether attention and MLP are also followed by a norm, of their output or of its sum with the
    state."""
    adapter: bool = False
    """Whether each step's input is a projection of the state and the recursion's input together."""
    exit_norm: bool = False
    """Whether the state that leaves the recursion is normalised."""

    hyper_connections: HyperConnections | None = None
    """The residual streams between steps."""
    history: HistoryInjection | None = None
    """The earlier states between steps."""
    norm_modulation: NormModulation | None = None
    """The modulation of the norms before attention and MLP."""

    def __post_init__(self) -> None:
        router = self.router or RouterShape(((),) * self.num_recursions)
        for entries in (router.scorers, router.capacity_factors):
            if entries is not None and len(entries) != self.num_recursions:
                raise ValueError(
                    f"{entries} must have {self.num_recursions} entries, one per step."
                )

    def copies(self, sublayer: Sublayer) -> int:
        """How many times the weights of a sublayer exist in each layer."""
        return self.num_recursions if sublayer in self.own_per_step else 1

    def mixing_weights(self, hidden_size: int) -> int:
        """Number of weights by which one step multiplies a token's residual streams."""
        given = self.hyper_connections
        if given is None or given.mixing == "static":
            return 0
        return 3 * given.streams * given.streams * hidden_size

    def mixing_parameters(self, hidden_size: int) -> int:
        """Number of parameters by which one step mixes residual streams."""
        if self.hyper_connections is None:
            return 0
        weights = self.mixing_weights(hidden_size)
        return weights + 3 * self.hyper_connections.streams + (3 if weights else 0)

    def modulation_weights(self, hidden_size: int) -> int:
        """Number of weights by which the norms of one layer multiply a token to be modulated."""
        given = self.norm_modulation
        return 0 if given is None else 2 * given.weights(hidden_size)

    @property
    def input_vectors(self) -> int:
        """Number of step embeddings, and of vectors that scale the recursion's input."""
        steps = self.num_recursions
        return steps * self.step_embeddings + (steps - 1) * self.input_injection


@dataclass(frozen=True)
class LatentShape:
    """The sizes of multi-latent attention that determine its cost, in one layer."""

    query_weights: int
    """Weights that each token is multiplied by to make its queries."""
    row_size: int
    """Numbers that are kept of a token: its latent row and the rotary part of its keys."""
    raising_weights: int
    """Weights that each latent row is multiplied by, at every step that sees it, to make keys and
    values."""
    value_size: int
    """Size of a token's values: heads times head size."""
    norm_weights: int
    """Weights of the norms of latent rows."""
    rank: int
    """Size of the latent row from which keys and values are projected."""
    query_rank: int
    """Size of the row from which queries are projected. 0: the hidden state."""

    @property
    def raised_size(self) -> int:
        """Numbers that a latent row is projected to: keys without their rotary part, and values."""
        return self.raising_weights // self.rank

    @classmethod
    def of_decoder(cls, config: DecoderConfig) -> Self | None:
        """The shape of a `MoRTransformer`'s latent attention, or None if it has another."""
        latent, heads = config.latent_attention, config.num_heads
        if latent is None:
            return None
        return cls(
            latent.query_weights(config.hidden_size, heads),
            latent.row_size,
            latent.kv_lora_rank * heads * (latent.qk_nope_head_dim + latent.v_head_dim),
            config.attention_output_size,
            latent.norm_weights,
            latent.kv_lora_rank,
            latent.q_lora_rank or 0,
        )


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer with RMSNorm that determine its cost."""

    vocab_size: int
    """Number of rows of the embedding, including padding."""
    hidden_size: int
    """Width of the residual stream (h)."""
    query_size: int
    """Size of a token's queries in one layer: query heads times head size."""
    kv_size: int
    """Size of a token's keys in one layer, which is also the size of its values; with `latent`, the
    size of the one row that it keeps."""
    stacks: tuple[StackShape, ...]
    """All layers, in order of execution."""
    tie_embeddings: bool = False
    """Whether the embedding and the output matrix share their weights."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases. Other biases are not counted."""
    qk_norm_size: int = 0
    """Number of weights in each of the two norms, of queries and of keys, in a layer. 0: none."""
    latent: LatentShape | None = None
    """Multi-latent attention. None: grouped-query attention of `query_size` and `kv_size`."""
    num_losses: int = 1
    """How often states are read out in training: once, or after every loop. Each time the layers after
    the last recursion and the output run."""
    heads: tuple[StackShape, ...] = ()
    """The layer of each head of multi-token prediction, which only training runs. A head also projects
    two states to one, has three norms, and multiplies by the output matrix."""

    @classmethod
    def from_decoder(cls, config: DecoderConfig, router: RouterShape | None = None) -> Self:
        """The shape of a `MoRTransformer`.

        Args:
            router: replaces the shape that the model's own router declares; for models with one
                recursion.

        Raises:
            ValueError: `router` is given, but there are several recursions.
        """
        if router is not None:
            config.only_recursion("ModelShape.from_decoder(..., router=...)")
        parts, stacks = config.parts, []
        outside = MLPShape.of_layer(config)
        if config.dense_ends:
            outside = MLPShape(config.ffn_hidden_size)
        plain = partial(StackShape, num_layers=1, mlp=outside, sandwich_norms=config.sum_norms)
        for part in parts:
            before = "prelude" if part is parts[0] else "between"
            after = "coda" if part is parts[-1] else "between"
            stacks += [plain(before)] * part.schedule.prelude
            stacks += _blocks(part, router)
            stacks += [plain(after)] * part.schedule.coda
        last = parts[-1].effective_recursion
        return cls(
            config.vocab_size,
            config.hidden_size,
            config.num_heads * config.head_size,
            config.cached_heads[0] * config.cached_heads[1],
            tuple(stacks),
            config.tie_embeddings,
            config.qkv_bias,
            config.head_size if config.qk_norm else 0,
            LatentShape.of_decoder(config),
            last.num_recursions if last.loop_loss is not None else 1,
            _heads(config),
        )

    def tokens_per_step(self, shares: Sequence[float], length: int) -> list[float] | None:
        """How many tokens of a sequence run each routed step, for `account`.

        Args:
            shares: of the tokens, for each step of a router, and of several recursions for each of their
                steps. Where layers route by themselves, one for all of those that do.
        """
        routed = sum(stack.num_recursions for stack in self.stacks if stack.router)
        if not shares:
            return None
        return [share * length for share in shares] * (routed // len(shares)) or None

    def planned_tokens(self, length: int) -> list[float] | None:
        """The same if settings do not determine it: where they do not, equally many tokens exit at each
        step, which is the target of the routers' balancing. None if they determine all of it."""
        routers = [(stack.router, stack.num_recursions) for stack in self.stacks if stack.router]
        if all(router.capacity_factors is not None for router, _ in routers):
            return None
        shares = [
            router.capacity_factors or default_capacity_factors(steps) for router, steps in routers
        ]
        return [share * length for own in shares for share in own]

    @property
    def value_size(self) -> int:
        """Size of what the heads of a layer return for a token."""
        return self.query_size if self.latent is None else self.latent.value_size

    @property
    def kept_size(self) -> int:
        """Numbers that are kept of a token in one layer."""
        return 2 * self.kv_size if self.latent is None else self.latent.row_size

    def plain(self) -> Self:
        """The plain model of the same depth, in which each repeat has weights of its own."""
        stacks = (StackShape(s.name, s.num_layers * s.num_recursions, s.mlp) for s in self.stacks)
        return replace(self, stacks=tuple(stacks), num_losses=1)


def _heads(config: DecoderConfig) -> tuple[StackShape, ...]:
    given = config.multi_token_prediction
    if given is None:
        return ()
    mlp = MLPShape.of_layer(config.head_config)
    return (StackShape("head", 1, mlp, sandwich_norms=config.sum_norms),) * given.num_heads


def _blocks(part: DecoderConfig, router: RouterShape | None) -> list[StackShape]:
    """The blocks of the one recursion of a decoder."""
    recursion, schedule = part.effective_recursion, part.schedule
    router = router or RouterShape.from_recursion(recursion, part.hidden_size)
    repeated = partial(
        StackShape,
        "block",
        mlp=MLPShape.of_layer(part, recursion),
        num_recursions=recursion.num_recursions,
        kv_policy=recursion.kv_policy,
        shares_norms=recursion.share_norms,
        own_per_step=recursion.own_per_step,
        relaxation=recursion.relaxation,
        step_embeddings=recursion.step_embeddings,
        input_injection=recursion.input_injection,
        loop_norm=recursion.loop_norm,
        sandwich_norms=recursion.sandwich_norms or part.sum_norms,
        adapter=recursion.adapter is not None,
        exit_norm=recursion.exit_norm,
        hyper_connections=recursion.hyper_connections,
        history=recursion.history,
        norm_modulation=recursion.norm_modulation if recursion.num_recursions > 1 else None,
    )

    def routes(block: int) -> bool:
        return recursion.router_of(block) is recursion.router

    # A cyclic step runs the whole block; in a sequence each layer repeats on its own.
    num_layers = schedule.block_size // schedule.num_blocks
    return [
        repeated(num_layers=num_layers, router=router if routes(index) else None)
        for index in range(schedule.num_blocks)
    ]
