"""Expert-choice routing: at each step, the tokens with the largest weights continue.

Source: arXiv 2507.10524, section 2.2.1, and its released implementation, which adds
`w · block(x)` to `x` although the block's output already includes the residual. We do the same,
because the published checkpoints depend on it.

Legend: `b` batch, `n` candidates of a step, `k` tokens selected, `h` hidden.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mor_layers.routers import losses
from mor_layers.routers.base import Router, RouterConfig, StepScores
from mor_layers.routers.capacity import checked_capacity_factors
from mor_layers.routers.declarations import PublishedRouter, ScorerMatrix, StepNotes
from mor_layers.routers.registry import register_router
from mor_layers.routers.scorer import (
    Scorer,
    bar_above,
    published_scorer,
    require_gates,
    scorer_matrices,
)
from mor_layers.selection import RoutingDecision
from mor_layers.settings import check_types, require_choice, require_not_negative, require_positive

Architecture = Literal["linear", "mlp"]
Combination = Literal["weighted", "additive", "residual"]
ExpertActivation = Literal["sigmoid", "tanh", "none"]
Predictor = Literal["aux_loss", "aux_router"]
LARGEST_MULTIPLE = 1 << 20


@register_router("expert_choice")
@dataclass(frozen=True)
class ExpertChoice(RouterConfig):
    """Settings of expert-choice routing; the defaults are the best ones published."""

    architecture: Architecture = "linear"
    """Scorer of each step: `linear` (h → 1) or `mlp` (h → 2h → 1, GELU)."""
    activation: ExpertActivation = "sigmoid"
    """Function from logits to scores."""
    alpha: float = 0.1
    """Weight = alpha · score. Above 0."""
    temperature: float = 1.0
    """Hidden states are divided by it before scoring. Above 0."""
    capacity_factors: tuple[float, ...] | None = None
    """Share of the sequence kept at each step, in (0, 1], not increasing. Default: (N_r-r+1)/N_r."""
    capacity_multiple: int = 1
    """Number of tokens that a step keeps of a document is rounded up to a multiple of this, but not
    above the document's length. A multiple of 128 fills the tiles of a GPU's matrix products: tokens
    that fill the last tile take no time. 1: no rounding."""
    warmup_steps: int = 0
    """Optimizer steps over which capacities decrease from 1 to their factors (cosine). 0: none."""
    predictor: Predictor = "aux_loss"
    """What learns to predict the selection for generation: the router itself, or a second one."""
    predictor_coefficient: float | None = None
    """Weight of the predictor's loss. Default: 0.001 for `aux_loss`; 1 for `aux_router`, where only
    the second router gets a gradient from it."""
    threshold: float = 0.5
    """In generation, a token continues if the predictor's probability is above this. In (0, 1)."""
    z_loss_coefficient: float = 0.0
    """Weight of the z-loss. 0: none."""
    combine: Combination = "weighted"
    """`weighted`: x + w · f(x). `additive`: x + f(x). `residual`: x + w · (f(x) - x), which weights what
    the layers add to the residual, as Mixture-of-Depths does."""
    gate_bias: float | None = None
    """Initial value of a learned bias of each step's logit, so that gates start open (above 0) or
    closed. None: no bias, as published."""

    def __post_init__(self) -> None:
        check_types(self)
        name = "ExpertChoice"
        require_choice(name, "architecture", self.architecture, get_args(Architecture))
        require_choice(name, "activation", self.activation, get_args(ExpertActivation))
        require_choice(name, "predictor", self.predictor, get_args(Predictor))
        require_choice(name, "combine", self.combine, get_args(Combination))
        require_gates(name, self.gate_bias, self.combine)
        require_positive(name, alpha=self.alpha, temperature=self.temperature)
        require_not_negative(
            name,
            warmup_steps=self.warmup_steps,
            z_loss_coefficient=self.z_loss_coefficient,
            predictor_coefficient=self.predictor_weight,
        )
        if not 1 <= self.capacity_multiple <= LARGEST_MULTIPLE:
            raise ValueError(
                f"{name}.capacity_multiple={self.capacity_multiple} must be between 1 (no rounding) and "
                f"{LARGEST_MULTIPLE}. Use the row size of your GPU's tiles, such as 128."
            )
        if self.warmup_steps >= 2**63:  # the counter's largest value
            raise ValueError(f"{name}.warmup_steps={self.warmup_steps} must be below 2^63.")
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"{name}.threshold={self.threshold} must lie in (0, 1).")
        if self.capacity_factors is not None:
            checked_capacity_factors(self.capacity_factors, len(self.capacity_factors))

    @property
    def predictor_weight(self) -> float:
        """`predictor_coefficient`, or its default."""
        if self.predictor_coefficient is not None:
            return self.predictor_coefficient
        return 0.001 if self.predictor == "aux_loss" else 1.0

    @property
    def needs_updates(self) -> bool:
        return self.warmup_steps > 0

    def validate(self, num_recursions: int) -> None:
        checked_capacity_factors(self.capacity_factors, num_recursions)

    def capacity_factors_for(self, num_recursions: int) -> tuple[float, ...]:
        return checked_capacity_factors(self.capacity_factors, num_recursions)

    @property
    def rounds_capacities_to(self) -> int:
        return self.capacity_multiple

    def capacity_factors_at(self, num_recursions: int, training_step: int) -> tuple[float, ...]:
        final = self.capacity_factors_for(num_recursions)
        return tuple(self.warmed_up(factor, training_step) for factor in final)

    def warmed_up(self, final: float, training_step: int) -> float:
        """A capacity factor during the optimizer step `training_step` (0-based)."""
        if final == 1.0 or self.warmup_steps == 0:
            return final
        progress = min(1.0, training_step / self.warmup_steps)
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))

    @property
    def has_fixed_capacities(self) -> bool:
        return self.warmup_steps == 0

    def scorer_shapes(
        self, hidden_size: int, num_recursions: int
    ) -> tuple[tuple[ScorerMatrix, ...], ...]:
        scorer = scorer_matrices(self.architecture, hidden_size, 1)
        if self.predictor == "aux_router":  # a twin that reads detached states
            scorer += (replace(scorer[0], backward_products=1), *scorer[1:])
        return (scorer,) * num_recursions

    def notes_for(self, num_recursions: int) -> tuple[StepNotes, ...]:
        return (StepNotes(has_gates=True),) * num_recursions

    def published_for(self, num_recursions: int) -> PublishedRouter:
        has_twin = self.predictor == "aux_router"
        names = {}
        for step in range(num_recursions):
            ours, architecture = f"scorers.{step}", self.architecture
            names |= published_scorer(ours, step, "mor_router", architecture)
            if has_twin:
                ours = f"predictors.{step}"
                names |= published_scorer(ours, step, "mlp_router", architecture)
        factors = self.capacity_factors_for(num_recursions)
        without_place = {
            # The published second router's loss has no weight; `coeff` is the other one's.
            "predictor_coefficient": has_twin and self.predictor_weight != 1.0,
            "threshold": self.threshold != ExpertChoice.threshold,
            # Without an activation the published code leaves alpha out.
            "alpha": self.activation == "none" and self.alpha != 1.0,
            "gate_bias": self.gate_bias is not None,
            "capacity_multiple": self.capacity_multiple != 1,
            "combine": self.combine == "residual",
        }
        return PublishedRouter(
            settings={
                "enable": True,
                "type": "expert",
                "capacity": ",".join(map(repr, factors)),
                "router_type": self.architecture,
                "z_loss": self.z_loss_coefficient > 0,
                "z_coeff": self.z_loss_coefficient,
                "temp": self.temperature,
                "expert": {
                    "cap_warmup_step": self.warmup_steps,
                    "router_func": None if self.activation == "none" else self.activation,
                    "alpha": self.alpha,
                    "sampling": self.predictor,
                    "include_first": True,
                    "coeff": 0.001 if has_twin else self.predictor_weight,
                    "gating": self.combine,
                },
            },
            layers="every_step",
            names=names,
            buffers={"training_steps": self.warmup_steps},
            without_place=tuple(name for name, is_set in without_place.items() if is_set),
        )

    def build(self, hidden_size: int, num_recursions: int) -> "ExpertChoiceRouter":
        return ExpertChoiceRouter(self, hidden_size, num_recursions)


class ExpertChoiceRouter(Router):
    """One scorer per step; the candidates with the largest weights run the step.

    Generation cannot compare a token with later ones. With `causal=True`, a candidate therefore
    continues if the predictor's probability exceeds the threshold. A step with a capacity of 1 keeps
    every token in both cases.
    """

    draws = False
    training_steps: Tensor
    bars: Tensor

    def __init__(self, config: ExpertChoice, hidden_size: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.config = config
        self.capacity_factors = checked_capacity_factors(config.capacity_factors, num_recursions)
        self.scorers = nn.ModuleList(
            Scorer(config.architecture, hidden_size, 1, config.gate_bias)
            for _ in range(num_recursions)
        )
        self.predictors = nn.ModuleList(
            Scorer(config.architecture, hidden_size, 1)
            for _ in range(num_recursions if config.predictor == "aux_router" else 0)
        )
        self.register_buffer("training_steps", torch.zeros((), dtype=torch.int64))
        # Thresholds on logits, set by `tune`; inf means that `threshold` applies.
        self.register_buffer("bars", torch.full((num_recursions,), math.inf))
        self._training_steps: int | None = None  # the buffers as the host last saw them
        self._bars: list[float] | None = None

    def logits(self, hidden: Tensor, step: int) -> Tensor:
        logits = self.scorers[step](hidden, self.config.temperature)
        if not self.predictors:
            return logits
        return torch.cat([logits, self.predictors[step](hidden.detach())], dim=-1)

    def decide(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
    ) -> RoutingDecision:
        assert logits is not None
        weights = self.config.alpha * self._activate(logits[..., 0])
        bar = self._bar(step) if causal else None
        capacity = self.capacity_factor(step), self.config.capacity_multiple
        if bar is not None:
            decision = previous.keep_where(self._handicapped(logits[..., -1], previous) > bar)
        elif previous.plan is None:
            decision = previous.keep_top(weights, *capacity)
        else:
            ranked = self._handicapped(logits[..., 0], previous)
            decision = previous.keep_top(ranked, *capacity)
        return decision.with_gates(decision.taken(weights))

    def assess(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        decision: RoutingDecision,
    ) -> RoutingDecision:
        assert logits is not None
        predicting = self._handicapped(logits[..., -1], previous)
        is_selected = decision.is_selected(len(logits))
        counted = previous.tokens.counted
        sampling = losses.sampling_loss(predicting, is_selected, counted)
        accuracy = losses.sampling_accuracy(predicting, is_selected, counted)
        terms = {"sampling_loss": self.config.predictor_weight * sampling}
        metrics = {"sampling_loss": sampling.detach(), "sampling_accuracy": accuracy.detach()}
        if self.config.z_loss_coefficient:
            z = losses.z_loss(logits[..., :1], counted)
            terms["router_z_loss"] = self.config.z_loss_coefficient * z
            metrics["router_z_loss"] = z.detach()
        return decision.with_losses(terms, metrics)

    def combine(
        self,
        step: int,
        selected: Tensor,
        output: Tensor,
        decision: RoutingDecision,
        origin: Tensor | None,
    ) -> Tensor:
        if self.config.combine == "additive":
            return selected + output
        if self.config.combine == "residual":
            output = output - selected
        return super().combine(step, selected, output, decision, origin)

    @property
    def adds_gated_output(self) -> bool:
        return self.config.combine == "weighted"

    def scores(self, logits: Tensor, step: int) -> tuple[StepScores, ...]:
        """The predictor's probability that a candidate continues."""
        bar = self._bar(step)
        threshold = None if bar is None else 1 / (1 + math.exp(-max(bar, -700.0)))
        return (StepScores(step, logits[..., -1].sigmoid(), threshold),)

    def advance(self, tokens_per_step: Tensor) -> None:
        self.training_steps += 1
        if (self._training_steps or 0) < self.config.warmup_steps:  # afterwards it does not matter
            self._training_steps = None

    @torch.no_grad()
    def tune(self, shares: tuple[float, ...], observe: Callable[[int], Tensor]) -> None:
        total = None
        for step, share in enumerate(shares):
            predicting = observe(step)[:, -1]
            total = len(predicting) if total is None else total
            self.bars[step] = bar_above(predicting, share * total)
            self._bars = None

    def _bar(self, step: int) -> float | None:
        """The value that the predictor's logit must exceed at a step; None: all tokens run it."""
        if self._bars is None:
            self._bars = self.bars.tolist()
        if self._bars[step] < math.inf:
            return self._bars[step]
        if self.capacity_factor(step) == 1.0:
            return None
        return math.log(self.config.threshold / (1.0 - self.config.threshold))

    def capacity_factor(self, step: int) -> float:
        """Share of the sequence that currently runs a step, including the warm-up."""
        final, warmup = self.capacity_factors[step], self.config.warmup_steps
        if final == 1.0 or warmup == 0:
            return final
        if self._training_steps is None:
            self._training_steps = int(self.training_steps)
        return self.config.warmed_up(final, self._training_steps)

    @staticmethod
    def _handicapped(logits: Tensor, previous: RoutingDecision) -> Tensor:
        """The logits that choose. A plan is what they are lowered by, which leaves gates as they are."""
        return logits if previous.plan is None else logits - previous.plan[..., 0]

    def _activate(self, logits: Tensor) -> Tensor:
        if self.config.activation == "sigmoid":
            return logits.sigmoid()
        return logits.tanh() if self.config.activation == "tanh" else logits

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._training_steps = self._bars = None
