"""Token-choice routing: every token chooses its depth once, before the first step.

Source: arXiv 2507.10524, section 2.2.1; the loss-free bias from Wang et al. 2024 (arXiv
2408.15664). Like the published code, we gate a token only at the step where it exits.

Legend: `b` batch, `n` candidates of a step, `k` tokens selected, `h` hidden, `r` depths.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mor_layers.routers import losses
from mor_layers.routers.base import Router, RouterConfig, StepScores
from mor_layers.routers.choice.expert_choice import Architecture, Combination
from mor_layers.routers.declarations import PublishedRouter, ScorerMatrix, StepNotes
from mor_layers.routers.registry import register_router
from mor_layers.routers.scorer import Scorer, published_scorer, require_gates, scorer_matrices
from mor_layers.selection import RoutingDecision
from mor_layers.settings import check_types, require_choice, require_not_negative, require_positive

TokenActivation = Literal["softmax", "sigmoid"]
Balancing = Literal["loss", "loss_free", "none"]


@register_router("token_choice")
@dataclass(frozen=True)
class TokenChoice(RouterConfig):
    """Settings of token-choice routing; the defaults are the best ones published."""

    architecture: Architecture = "linear"
    """Scorer: `linear` (h → N_r) or `mlp` (h → 2h → N_r, GELU)."""
    activation: TokenActivation = "softmax"
    """Function from logits to the probability of each depth."""
    alpha: float = 1.0
    """Probability = alpha · sigmoid(logit). Above 0; must stay 1 with `softmax`."""
    temperature: float = 1.0
    """Hidden states are divided by it before scoring. Above 0."""
    balancing: Balancing = "loss"
    """What balances the depths: a `loss`, a bias on the choice (`loss_free`), or `none`."""
    balancing_coefficient: float | None = None
    """Weight of the balancing loss (default 0.1), or the step u by which the loss-free bias moves
    after each optimizer step (default 0.001)."""
    z_loss_coefficient: float = 0.0
    """Weight of the z-loss. 0: none."""
    combine: Combination = "weighted"
    """A token that exits becomes `weighted`: H_1 + g · f(x), or `additive`: H_1 + f(x)."""
    gate_bias: float | None = None
    """Initial value of a learned bias of each depth's logit, so that gates start open (above 0) or
    closed. None: no bias, as published."""

    def __post_init__(self) -> None:
        check_types(self)
        name = "TokenChoice"
        require_choice(name, "architecture", self.architecture, get_args(Architecture))
        require_choice(name, "activation", self.activation, get_args(TokenActivation))
        require_choice(name, "balancing", self.balancing, get_args(Balancing))
        require_choice(name, "combine", self.combine, get_args(Combination))
        require_gates(name, self.gate_bias, self.combine, self.activation)
        require_positive(name, alpha=self.alpha, temperature=self.temperature)
        require_not_negative(name, z_loss_coefficient=self.z_loss_coefficient)
        if self.activation == "softmax" and self.alpha != 1.0:
            raise ValueError(
                f"{name}.alpha={self.alpha} has no effect with activation='softmax'. "
                "Leave it out, or use activation='sigmoid'."
            )
        if self.balancing_coefficient is not None:
            require_not_negative(name, balancing_coefficient=self.balancing_coefficient)
            if self.balancing == "none":
                raise ValueError(
                    f"{name}.balancing_coefficient={self.balancing_coefficient} has no effect "
                    "with balancing='none'. Leave it out, or use 'loss' or 'loss_free'."
                )

    @property
    def balancing_weight(self) -> float:
        """`balancing_coefficient`, or its default."""
        if self.balancing_coefficient is not None:
            return self.balancing_coefficient
        return {"loss": 0.1, "loss_free": 0.001, "none": 0.0}[self.balancing]

    @property
    def needs_updates(self) -> bool:
        return self.balancing == "loss_free"

    @property
    def is_causal(self) -> bool:
        return True

    def scorer_shapes(
        self, hidden_size: int, num_recursions: int
    ) -> tuple[tuple[ScorerMatrix, ...], ...]:
        scorer = scorer_matrices(self.architecture, hidden_size, num_recursions)
        has_loss = self.balancing == "loss" or self.z_loss_coefficient > 0
        if self.combine == "additive" and not has_loss:  # nothing reads the gate
            scorer = tuple(replace(matrix, backward_products=0) for matrix in scorer)
        return (scorer, *((),) * (num_recursions - 1))

    def notes_for(self, num_recursions: int) -> tuple[StepNotes, ...]:
        return (StepNotes(plan_size=2),) * num_recursions  # depth and gate

    def published_for(self, num_recursions: int) -> PublishedRouter:
        names = published_scorer("scorer", 0, "mor_router", self.architecture)
        if self.balancing == "loss_free":
            names["depth_bias"] = (0, "router_bias")
        has_loss = self.balancing == "loss"
        without_place = {
            "balancing": self.balancing == "none",
            "gate_bias": self.gate_bias is not None,
        }
        return PublishedRouter(
            settings={
                "enable": True,
                "type": "token",
                "router_type": self.architecture,
                "z_loss": self.z_loss_coefficient > 0,
                "z_coeff": self.z_loss_coefficient,
                "temp": self.temperature,
                "token": {
                    "bal_warmup_step": 0,
                    "router_func": self.activation,
                    "alpha": self.alpha,
                    "balancing": self.balancing,
                    "coeff": self.balancing_weight if has_loss else 0.1,
                    "u": 0.001 if has_loss else self.balancing_weight,
                    "gating": self.combine,
                },
            },
            layers="one_entry",
            names=names,
            without_place=tuple(name for name, is_set in without_place.items() if is_set),
        )

    def build(self, hidden_size: int, num_recursions: int) -> "TokenChoiceRouter":
        return TokenChoiceRouter(self, hidden_size, num_recursions)


class TokenChoiceRouter(Router):
    """Plans `(depth, gate)` of each token at the first step; later steps follow the plan."""

    combines_with_origin = True
    depth_bias: Tensor

    def __init__(self, config: TokenChoice, hidden_size: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.config = config
        self.scorer = Scorer(config.architecture, hidden_size, num_recursions, config.gate_bias)
        self.register_buffer("depth_bias", torch.zeros(num_recursions))

    def logits(self, hidden: Tensor, step: int) -> Tensor | None:
        return self.scorer(hidden, self.config.temperature) if step == 0 else None

    def decide(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
    ) -> RoutingDecision:
        if step > 0:
            assert previous.plan is not None
            return previous.keep_where(previous.plan[..., 0] >= step)
        assert logits is not None
        probabilities, depth = self._choose(logits)
        gate = probabilities.gather(-1, depth[..., None])[..., 0]
        # [n b] + [n b] -> [n b 2]: depth is a small whole number, exact in fp32
        plan = torch.stack([depth.to(gate.dtype), gate], dim=-1)
        return previous.with_plan(plan).keep_valid()

    def assess(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        decision: RoutingDecision,
    ) -> RoutingDecision:
        if logits is None:
            return decision
        probabilities, depth = self._choose(logits)
        counted = previous.tokens.counted
        is_depth = F.one_hot(depth, self.num_recursions).bool()
        balancing = losses.balancing_loss(probabilities, is_depth, counted)
        metrics = {"balancing_loss": balancing.detach()}
        terms = {}
        if self.config.balancing == "loss":
            terms["balancing_loss"] = self.config.balancing_weight * balancing
        if self.config.z_loss_coefficient:
            z = losses.z_loss(logits, counted)
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
        assert origin is not None and decision.plan is not None
        depth, gate = decision.plan.unbind(dim=-1)
        gated = output * gate[..., None].to(output.dtype)
        exit_state = origin + (output if self.config.combine == "additive" else gated)
        return torch.where((depth == step)[..., None], exit_state, output)

    def scores(self, logits: Tensor, step: int) -> tuple[StepScores, ...]:
        """The probability of each depth, including the bias; the largest one is chosen."""
        biased = self._activate(logits) + self.depth_bias.float()
        return tuple(StepScores(depth, p) for depth, p in enumerate(biased.unbind(dim=-1)))

    def advance(self, tokens_per_step: Tensor) -> None:
        if self.config.balancing != "loss_free":
            return
        counts = tokens_per_step.to(self.depth_bias)
        counts = counts - F.pad(counts[1:], (0, 1))  # tokens that ran a step -> that ended there
        # sign(mean share - share) in whole numbers, so that rounding does not move an even share.
        direction = (counts.sum() - self.num_recursions * counts).sign()
        self.depth_bias += self.config.balancing_weight * direction

    @torch.no_grad()
    def tune(self, shares: tuple[float, ...], observe: Callable[[int], Tensor]) -> None:
        if shares[0] < 1.0:
            raise ValueError(f"shares={shares}: TokenChoice runs step 1 for every token. Use 1.")
        probabilities = self._activate(observe(0))
        reached = torch.tensor([*shares, 0.0], device=probabilities.device)
        wanted = -reached.diff()  # share of tokens that end at each step
        bias, step = self.depth_bias.float().clone(), 0.5
        for _ in range(400):  # raise what is chosen too rarely, in shrinking steps
            depth = (probabilities + bias).argmax(dim=-1)
            bias += step * (wanted - depth.bincount(minlength=len(bias)) / len(depth))
            step *= 0.98
        self.depth_bias.copy_(bias)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of each depth, `[n b r]`, and the depth that each candidate gets, `[n b]`."""
        probabilities = self._activate(logits)
        return probabilities, (probabilities.detach() + self.depth_bias.float()).argmax(dim=-1)

    def _activate(self, logits: Tensor) -> Tensor:
        if self.config.activation == "softmax":
            return logits.softmax(dim=-1)
        return self.config.alpha * logits.sigmoid()
