"""Expert-choice routing: at each step, the tokens of largest weight go on.

Source: arXiv 2507.10524, section 2.2.1, and its released implementation, which adds
`w · block(x)` to `x` although the block's output already holds the residual; so do we, because
the published checkpoints do.

Legend: `b` batch, `n` candidates of a step, `k` tokens selected, `h` hidden.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mor_layers.routers import losses
from mor_layers.routers.base import Router, RouterConfig, StepScores
from mor_layers.routers.capacity import checked_capacity_factors
from mor_layers.routers.registry import register_router
from mor_layers.routers.scorer import Scorer, bar_above, require_gates
from mor_layers.selection import RoutingDecision
from mor_layers.settings import check_types, require_choice, require_not_negative, require_positive

Architecture = Literal["linear", "mlp"]
Combination = Literal["weighted", "additive"]
ExpertActivation = Literal["sigmoid", "tanh", "none"]
Predictor = Literal["aux_loss", "aux_router"]


@register_router("expert_choice")
@dataclass(frozen=True)
class ExpertChoice(RouterConfig):
    """Settings of expert-choice routing; the defaults are the published best ones."""

    architecture: Architecture = "linear"
    """Scorer of each step: `linear` (h → 1) or `mlp` (h → 2h → 1, GELU)."""
    activation: ExpertActivation = "sigmoid"
    """From logits to scores."""
    alpha: float = 0.1
    """Weight = alpha · score. Above 0."""
    temperature: float = 1.0
    """Hidden states are divided by it before scoring. Above 0."""
    capacity_factors: tuple[float, ...] | None = None
    """Share of the sequence kept at each step, in (0, 1], never rising. Default: (N_r-r+1)/N_r."""
    warmup_steps: int = 0
    """Optimizer steps over which capacities go from 1 to their factors along a cosine. 0: none."""
    predictor: Predictor = "aux_loss"
    """What learns to foresee the selection for generation: the router itself, or a second one."""
    predictor_coefficient: float | None = None
    """Weight of the predictor's loss. Default: 0.001 for `aux_loss`; 1 for `aux_router`, whose
    gradient reaches only itself."""
    threshold: float = 0.5
    """In generation a token goes on where the predictor's probability is above it. In (0, 1)."""
    z_loss_coefficient: float = 0.0
    """Weight of the z-loss. 0: none."""
    combine: Combination = "weighted"
    """`weighted`: x + w · f(x). `additive`: x + f(x)."""
    gate_bias: float | None = None
    """First value of a learnt bias of each step's logit, so that gates begin open (above 0) or closed.
    None: no bias, as published."""

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
        if self.warmup_steps >= 2**63:  # the counter's largest value
            raise ValueError(f"{name}.warmup_steps={self.warmup_steps} must be below 2^63.")
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"{name}.threshold={self.threshold} must lie in (0, 1).")
        if self.capacity_factors is not None:
            checked_capacity_factors(self.capacity_factors, len(self.capacity_factors))

    @property
    def predictor_weight(self) -> float:
        """`predictor_coefficient`, its default filled in."""
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

    def build(self, hidden_size: int, num_recursions: int) -> "ExpertChoiceRouter":
        return ExpertChoiceRouter(self, hidden_size, num_recursions)


class ExpertChoiceRouter(Router):
    """One scorer a step; the candidates of largest weight run it.

    Generation cannot compare with later tokens: with `causal=True` a candidate goes on where the
    predictor's probability exceeds the threshold. A step whose capacity is everything keeps
    everything either way.
    """

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
        # Logits set by `tune`; inf where `threshold` decides.
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
        if bar is not None:
            decision = previous.keep_where(logits[..., -1] > bar)
        else:
            decision = previous.keep_top(weights, self.capacity_factor(step))
        return decision.with_gates(decision.taken(weights))

    def assess(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        decision: RoutingDecision,
    ) -> RoutingDecision:
        assert logits is not None
        predicting = logits[..., -1]
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
        return super().combine(step, selected, output, decision, origin)

    def scores(self, logits: Tensor, step: int) -> tuple[StepScores, ...]:
        """The predictor's probability that a candidate goes on."""
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
        """What the predictor's logit must exceed for a step; None: everyone runs it."""
        if self._bars is None:
            self._bars = self.bars.tolist()
        if self._bars[step] < math.inf:
            return self._bars[step]
        if self.capacity_factor(step) == 1.0:
            return None
        return math.log(self.config.threshold / (1.0 - self.config.threshold))

    def capacity_factor(self, step: int) -> float:
        """Share of the sequence that runs a step now, warm-up included."""
        final, warmup = self.capacity_factors[step], self.config.warmup_steps
        if final == 1.0 or warmup == 0:
            return final
        if self._training_steps is None:
            self._training_steps = int(self.training_steps)
        progress = min(1.0, self._training_steps / warmup)
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def _activate(self, logits: Tensor) -> Tensor:
        if self.config.activation == "sigmoid":
            return logits.sigmoid()
        return logits.tanh() if self.config.activation == "tanh" else logits

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._training_steps = self._bars = None
