"""Settings of a recursion: sharing, routing, keys and values, and what makes steps differ.

Each component has a frozen dataclass of its own, and a router's settings are next to the router. A
wrong setting raises an error before anything is built.
"""

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field

from mor_layers.layers import (
    MLP_PROJECTIONS,
    PROJECTIONS_OF,
    SUBLAYERS,
    ExpertRouters,
    NormModulation,
    Projection,
    Relaxation,
    Sublayer,
)
from mor_layers.models.limits import MOST_LAYERS
from mor_layers.recursion import (
    KV_POLICIES,
    SHARING_SCHEMES,
    History,
    HistoryInjection,
    HyperConnections,
    KVPolicy,
    LoopLoss,
    Sharing,
    SharingSchedule,
    StateAdapter,
    StepInput,
    Streams,
    end_layers,
    require_lengths,
)
from mor_layers.routers import ExpertChoice, FixedDepth, LoopState, RouterConfig
from mor_layers.settings import check_types, require_choice


@dataclass(frozen=True)
class RecursionConfig:
    """How a recursion block shares its layers, routes tokens and attends."""

    num_recursions: int
    """How many times the shared block runs (N_r in the paper). At least 1."""
    sharing: Sharing = "middle_cycle"
    """Which weights run at which depth: cycle, sequence, middle_cycle or middle_sequence."""
    router: RouterConfig = field(default_factory=FixedDepth)
    """Which tokens continue at each step. In YAML, a mapping with `type`: a registered name, or
    `package.module:ClassName` for a RouterConfig of your own."""
    kv_policy: KVPolicy = "recursion_wise"
    """Keys and values at later steps: recursion_wise, recursive_sharing, sharing_with_update or
    exit_state."""
    share_norms: bool = True
    """Whether the steps share the weights of norms, or each step has its own."""
    expert_routers: ExpertRouters = "shared"
    """If layers have experts: whether the steps share the router over them (`shared`), or each step
    has its own (`per_step`)."""
    relaxation: Relaxation | None = None
    """Low-rank deltas that each step adds to projections; None: all steps use the same weights."""
    step_embeddings: bool = False
    """Whether each step adds a learned vector to the states that enter the block."""
    input_injection: bool = False
    """Whether later steps add the states that entered the recursion, multiplied by a learned gain."""
    loop_norm: bool = False
    """Whether later steps start from the normalised state, as in Ouro (arXiv 2510.25741)."""
    sandwich_norms: bool = False
    """Whether the block's layers normalise the outputs of attention and MLP before adding them."""
    prelude_layers: int | None = None
    """Unshared layers before the recursion, 0 or more, under any sharing scheme; None: 1 under
    middle_cycle and middle_sequence, 0 under cycle and sequence."""
    coda_layers: int | None = None
    """Unshared layers after the recursion, 0 or more, under any sharing scheme; None: 1 or 0, as for
    `prelude_layers`."""
    residual_scale: float | None = None
    """λ of the factor λ / (num_recursions · √K) by which the block's K layers multiply what attention
    and MLP add to the residual (arXiv 2606.18524). Above 0; None: no factor."""
    own_per_step: tuple[Sublayer, ...] = ()
    """The sublayers, `attention` or `mlp`, of which each step has weights of its own. All steps share
    the other one, and experts. For norms there is `share_norms`, for routers over experts
    `expert_routers`."""
    loop_loss: LoopLoss | None = None
    """In training, a loss after every step, weighted by a fixed prior over depths; None: a loss after
    the last one."""
    hyper_connections: HyperConnections | None = None
    """Residual streams that each step reads and writes; None: a single stream."""
    norm_modulation: NormModulation | None = None
    """Modulation of the block's norms before attention and MLP by step and state; None: none."""
    anchor_every: int | None = None
    """Under sequence or middle_sequence with a single recursion, where each layer of the block has a
    router of its own (Mixture-of-Depths): every n-th of them has none and runs all tokens. At least 2;
    None: all of them route."""
    depth_balance: float | None = None
    """Where each layer routes by itself: how much a token's logit falls, when layers choose, for each
    layer that it ran since the last anchor (X-MoD, arXiv 2609.34212). Above 0; needs ExpertChoice;
    None: no balance."""
    history: HistoryInjection | None = None
    """Earlier states that each step sees, by channel, and a gate of each step; None: neither."""
    block_layers: int | None = None
    """Layers of the shared block (K), at least 1. Where a model has several recursions, all of them
    but one must say it; None: what `num_unrolled_layers` leaves."""

    adapter: StateAdapter | None = None
    """A projection, before every step, of the state and the recursion's input together, which takes the
    place of the state; the first step's state is zero or drawn. As in Huginn (arXiv 2502.05171)."""
    exit_norm: bool = False
    """Whether the state that leaves the recursion is normalised, before the coda, which must then have
    at least one layer."""

    def __post_init__(self) -> None:
        if not isinstance(self.router, RouterConfig):
            raise ValueError(
                f"router={self.router!r} is not a RouterConfig. Use one such as ExpertChoice() or "
                "FixedDepth(); a name with settings is for YAML."
            )
        check_types(self)
        if self.num_recursions < 1:
            raise ValueError(f"num_recursions={self.num_recursions} must be at least 1.")
        if self.num_recursions > MOST_LAYERS:
            raise ValueError(f"num_recursions={self.num_recursions} must be at most {MOST_LAYERS}.")
        name, expert_routers = "RecursionConfig", typing.get_args(ExpertRouters)
        require_choice(name, "sharing", self.sharing, SHARING_SCHEMES)
        require_choice(name, "kv_policy", self.kv_policy, KV_POLICIES)
        require_choice(name, "expert_routers", self.expert_routers, expert_routers)
        require_lengths(self.prelude_layers, self.coda_layers)
        if self.block_layers is not None and self.block_layers < 1:
            raise ValueError(f"block_layers={self.block_layers} must be at least 1, or None.")
        if self.residual_scale is not None and not 0 < self.residual_scale < math.inf:
            raise ValueError(
                f"residual_scale={self.residual_scale} must be above 0 and finite, or None."
            )
        self.router.validate(self.num_recursions)
        if self.relaxation is not None:
            self.relaxation.check(self.num_recursions, self.kv_policy)
        self._check_own()
        self._check_anchors()
        if self.num_recursions < 2 and self.beyond_published:
            raise ValueError(
                f"{self.beyond_published[0]} needs several steps, not num_recursions="
                f"{self.num_recursions}. Leave it out."
            )
        if self.kv_policy == "exit_state" and not self.share_norms:
            raise ValueError(
                "kv_policy='exit_state' projects an exited token once for all later steps, which "
                "share_norms=False would make different at each. Use share_norms=True, or another "
                "kv_policy."
            )
        if self.kv_policy == "exit_state" and self.norm_modulation is not None:
            raise ValueError(
                "kv_policy='exit_state' projects an exited token once for all later steps, which "
                f"norm_modulation={self.norm_modulation} would make different at each. Leave it out, or "
                "use another kv_policy."
            )
        if self.loop_loss is not None and self.num_recursions < 2:
            raise ValueError(
                f"loop_loss needs several steps, not num_recursions={self.num_recursions}. Leave it out."
            )
        self._check_truncation()
        if self.router.learns_exits and self.loop_loss is None:
            raise ValueError(
                f"router={self.router} learns from what is read out after every step. Give the "
                "recursion a loop_loss, such as LoopLoss(), or leave teaching out."
            )
        if self.history is not None:
            self.history.check(self.num_recursions)
        carrying = {
            "history": self.history,
            "hyper_connections": self.hyper_connections,
            "router": self.router if self.router.has_loop_state else None,
        }
        given = [f"{name}={value}" for name, value in carrying.items() if value is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} both say what a token carries between steps. Leave one of them "
                "out."
            )
        if self.sharing in ("cycle", "middle_cycle"):
            return
        for name in ("loop_loss", "hyper_connections", "history", "adapter"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs cycle or middle_cycle sharing, in which a "
                    f"block repeats as a whole, not sharing={self.sharing!r}. Leave it out."
                )
        if self.residual_scale is not None:
            raise ValueError(
                f"residual_scale={self.residual_scale} needs cycle or middle_cycle sharing, in which "
                f"a block repeats as a whole, not {self.sharing!r}. Leave it out."
            )
        if not self.router.repeats_layers and self.num_recursions > 1:
            raise ValueError(
                f"sharing={self.sharing!r} cannot route tokens with "
                f"{type(self.router).__name__}: its layers repeat one by one, so no step runs the "
                "whole block. Use cycle or middle_cycle, or router FixedDepth or DampedLoops, or "
                "num_recursions=1, with which each layer routes by itself."
            )
        if self.kv_policy != "recursion_wise":
            raise ValueError(
                f"kv_policy={self.kv_policy!r} needs cycle or middle_cycle sharing, "
                f"not {self.sharing!r}. Use kv_policy='recursion_wise'."
            )

    def _check_truncation(self) -> None:
        """Raise ValueError if gradients through the last steps only would leave something untrained."""
        if not self.router.truncates_gradients:
            return
        given = f"router={self.router}: gradients go through the last steps only, and "
        if not self.input_injection and self.adapter is None:
            raise ValueError(
                f"{given}nothing before the recursion would learn. Use input_injection=True, or an "
                "adapter, by which later steps see what enters the recursion."
            )
        if self.kv_policy == "recursive_sharing":
            raise ValueError(
                f"{given}kv_policy='recursive_sharing' computes keys and values at the first step only, "
                "so they would not learn. Use another kv_policy."
            )
        if self.loop_loss is not None:
            raise ValueError(
                f"{given}loop_loss reads the states of all of them. Leave one of the two out."
            )

    def _check_anchors(self) -> None:
        """Raise ValueError if anchors are among layers that do not route, or no token skips a layer."""
        if self.anchor_every is not None:
            if self.anchor_every < 2:
                raise ValueError(f"anchor_every={self.anchor_every} must be at least 2, or None.")
            if not self.routes_by_layer:
                raise ValueError(
                    f"anchor_every={self.anchor_every} needs layers that route by themselves: sequence "
                    "or middle_sequence sharing, num_recursions=1, and a router that lets tokens skip "
                    "them. Leave it out."
                )
        if self.depth_balance is not None:
            if not 0 < self.depth_balance < math.inf:
                raise ValueError(
                    f"depth_balance={self.depth_balance} must be above 0 and finite, or None."
                )
            if not self.routes_by_layer or not isinstance(self.router, ExpertChoice):
                raise ValueError(
                    f"depth_balance={self.depth_balance} needs layers that route by themselves "
                    "(sequence or middle_sequence sharing, num_recursions=1) with ExpertChoice. Leave "
                    "it out."
                )
        if self.routes_by_layer and self.router.capacity_factors_for(1) == (1.0,):
            raise ValueError(
                f"router={self.router} lets every token run every layer. Use capacity_factors=(0.125,), "
                "for example, or FixedDepth."
            )

    @property
    def routes_by_layer(self) -> bool:
        """Whether each layer of the block has a router of its own, as in Mixture-of-Depths."""
        is_single = self.num_recursions == 1 and self.sharing in ("sequence", "middle_sequence")
        return is_single and not isinstance(self.router, FixedDepth)

    def router_of(self, block: int) -> RouterConfig:
        """The router of a recursion block, by its 0-based number; only sequence schemes have several."""
        is_anchor = self.anchor_every is not None and (block + 1) % self.anchor_every == 0
        return FixedDepth() if is_anchor else self.router

    def _check_own(self) -> None:
        """Raise ValueError if weights of single steps would not be used, or are no sublayer's."""
        own = self.own_per_step
        if any(name not in SUBLAYERS for name in own) or len(set(own)) < len(own):
            raise ValueError(
                f"own_per_step={own} must name any of {', '.join(SUBLAYERS)}, each once; (): none."
            )
        why = {
            "exit_state": "projects an exited token once for all later steps",
            "recursive_sharing": "computes keys and values at the first step only",
        }.get(self.kv_policy)
        if "attention" in own and why is not None:
            raise ValueError(
                f"kv_policy={self.kv_policy!r} {why}, so own_per_step={own} cannot have attention. "
                "Use kv_policy='recursion_wise' or 'sharing_with_update', or share attention."
            )
        relaxed = () if self.relaxation is None else self.relaxation.projections
        if set(relaxed) & set(self.own_projections):
            rest = tuple(name for name in relaxed if name not in self.own_projections)
            raise ValueError(
                f"Relaxation.projections={relaxed} cannot have those of own_per_step={own}, whose "
                f"weights are not shared. Use projections={rest}, or no relaxation."
            )

    @property
    def own_projections(self) -> tuple[Projection, ...]:
        """The projections of which each step has its own."""
        return tuple(name for sublayer in self.own_per_step for name in PROJECTIONS_OF[sublayer])

    @property
    def mean_experts(self) -> tuple[float, ...] | None:
        """Mean number of experts per token at each step; None: the layers' own number."""
        return self.router.mean_experts_for(self.num_recursions)

    @property
    def beyond_published(self) -> tuple[str, ...]:
        """The settings in use that published checkpoints and plain decoders do not have."""
        names = ("relaxation", "step_embeddings", "input_injection", "sandwich_norms")
        names += ("residual_scale", "loop_norm", "own_per_step", "hyper_connections")
        names += ("norm_modulation", "history", "adapter", "exit_norm")
        return tuple(name for name in names if getattr(self, name))

    def residual_factor(self, block_size: int) -> float | None:
        """What the branches of a block of `block_size` layers are multiplied by; None: nothing."""
        if self.residual_scale is None:
            return None
        return self.residual_scale / (self.num_recursions * math.sqrt(block_size))

    def build_step_input(self, hidden_size: int, norm_epsilon: float) -> StepInput | None:
        """The module that changes the states entering the block; None if they enter as they are."""
        if not (self.step_embeddings or self.input_injection or self.loop_norm or self.adapter):
            return None
        return StepInput(
            hidden_size,
            num_steps=self.num_recursions,
            embeds=self.step_embeddings,
            injects=self.input_injection,
            norm_epsilon=norm_epsilon if self.loop_norm else None,
            adapter=self.adapter,
        )

    def build_streams(self, hidden_size: int) -> Streams | None:
        """The residual streams of the block; None if there is a single one."""
        if self.hyper_connections is None:
            return None
        return Streams(hidden_size, self.num_recursions, self.hyper_connections)

    def build_history(self, hidden_size: int) -> History | None:
        """The earlier states that tokens carry; None if they carry none."""
        if self.history is None:
            return None
        return History(hidden_size, self.num_recursions, self.history)

    def build_loop_state(self, hidden_size: int) -> LoopState | None:
        """What tokens carry between steps, if it is more than their state."""
        return (
            self.build_streams(hidden_size)
            or self.build_history(hidden_size)
            or self.router.build(hidden_size, self.num_recursions).loop_state
        )

    def require_experts(self, has_experts: bool) -> None:
        """Raise ValueError if a setting for experts has no effect."""
        if not has_experts and self.expert_routers != "shared":
            raise ValueError(
                f"expert_routers={self.expert_routers!r} needs layers with experts. Leave it out, "
                "or give the model a mixture of experts."
            )
        if has_experts and "mlp" in self.own_per_step:
            raise ValueError(
                f"own_per_step={self.own_per_step} cannot have mlp where the MLP is a mixture of "
                "experts, which all steps share. For experts that only some steps use, take more "
                "experts and expert_routers='per_step'."
            )
        relaxed = () if self.relaxation is None else self.relaxation.projections
        if has_experts and set(relaxed) & set(MLP_PROJECTIONS):
            rest = tuple(name for name in relaxed if name not in MLP_PROJECTIONS)
            raise ValueError(
                f"Relaxation.projections={relaxed} cannot have {', '.join(MLP_PROJECTIONS)} where "
                f"the MLP is a mixture of experts. Use projections={rest or ('output',)}."
            )
        if not has_experts and self.mean_experts is not None:
            raise ValueError(
                f"mean_experts={self.mean_experts[0]} needs layers with experts. Leave it out, or "
                "give the model a mixture of experts."
            )

    @property
    def ends(self) -> tuple[int, int]:
        """Number of unshared layers before and after the recursion."""
        default = end_layers(self.sharing)
        before, after = self.prelude_layers, self.coda_layers
        return default if before is None else before, default if after is None else after

    @property
    def num_unrolled_layers(self) -> int | None:
        """Depth counted with repeats, prelude and coda included; None if `block_layers` is not set."""
        if self.block_layers is None:
            return None
        return self.block_layers * self.num_recursions + sum(self.ends)

    def schedule(self, num_unrolled_layers: int) -> SharingSchedule:
        """Which layer runs at which depth of a model of `num_unrolled_layers`.

        Raises:
            ValueError: the layers cannot be divided, or `block_layers` needs another number of them.
        """
        if self.num_unrolled_layers not in (None, num_unrolled_layers):
            raise ValueError(
                f"num_unrolled_layers={num_unrolled_layers} is not what block_layers="
                f"{self.block_layers} makes with num_recursions={self.num_recursions} and "
                f"{sum(self.ends)} layers around the recursion. Use num_unrolled_layers="
                f"{self.num_unrolled_layers}, or leave block_layers out."
            )
        return SharingSchedule(
            num_unrolled_layers,
            self.num_recursions,
            self.sharing,
            self.prelude_layers,
            self.coda_layers,
        )


def unrolled_lengths(
    recursions: Sequence[RecursionConfig], num_unrolled_layers: int
) -> tuple[int, ...]:
    """How many of a model's unrolled layers each of its recursions has, with those around it.

    Raises:
        ValueError: several leave `block_layers` out, or the layers do not add up.
    """
    given = [recursion.num_unrolled_layers for recursion in recursions]
    rest = num_unrolled_layers - sum(length for length in given if length is not None)
    if given.count(None) > 1:
        unset = ", ".join(f"recursion[{i}]" for i, length in enumerate(given) if length is None)
        raise ValueError(
            f"{unset} do not say how many layers their blocks have. Set block_layers for all "
            f"{len(given)} recursions but one."
        )
    if None not in given and rest:
        raise ValueError(
            f"num_unrolled_layers={num_unrolled_layers} is not the sum of the recursions, "
            f"{' + '.join(map(str, given))}. Use num_unrolled_layers={num_unrolled_layers - rest}, or "
            "leave block_layers of one of them out."
        )
    if rest < 0:
        raise ValueError(
            f"num_unrolled_layers={num_unrolled_layers} is less than the {num_unrolled_layers - rest} "
            "layers of the recursions that set block_layers. Use more, or smaller blocks."
        )
    return tuple(rest if length is None else length for length in given)
