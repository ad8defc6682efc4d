"""Adaptive computation time: a token halts once its halting probabilities add up to almost 1.

    p_r = σ(w · H_r + b)                          from the state that enters step r
    weight_r = p_r                                while Σ p_i ≤ 1 - ε over the steps up to r
             = 1 - Σ p_i over the earlier steps   at the first step at which it is more, or the last
    result = Σ weight_r · H_{r+1}                 the weights of a token's steps sum to 1
    ponder cost = number of steps + last weight   mean over tokens, times a coefficient

The number of steps has no gradient. The last weight has one, which raises the earlier probabilities.

Sources: Graves 2016 (arXiv 1603.08983); Dehghani et al. 2018 (arXiv 1807.03819, Universal Transformers)
for halting of each token, the state that the probability is of, the first bias of 1, and the
coefficient 0.01. Their code interpolates between the states of successive steps; here the result is the
mean that Graves defines, with the remainder as the weight of the last one. It is a baseline: in
language models it tends to collapse to one loop (arXiv 2609.03379).

Legend: `b` batch, `n` candidates of a step, `k` tokens that run it, `h` hidden.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mor_layers.routers.base import Router, RouterConfig
from mor_layers.routers.declarations import ScorerMatrix, StepNotes
from mor_layers.routers.loop_state import Combine, LoopState
from mor_layers.routers.registry import register_router
from mor_layers.routers.scorer import Scorer, scorer_matrices
from mor_layers.selection import RoutingDecision
from mor_layers.settings import check_types, require_not_negative


@register_router("adaptive_halting")
@dataclass(frozen=True)
class AdaptiveHalting(RouterConfig):
    """Settings of adaptive computation time (ACT)."""

    epsilon: float = 0.01
    """A token halts when its probabilities exceed 1 minus this. In (0, 1)."""
    ponder_cost: float = 0.01
    """Weight of the number of steps plus the last weight, mean over positions. 0: none."""
    bias: float = 1.0
    """Initial value of the bias of the logits; above 0, tokens halt early at first."""

    def __post_init__(self) -> None:
        check_types(self)
        require_not_negative("AdaptiveHalting", ponder_cost=self.ponder_cost)
        if not 0 < self.epsilon < 1:
            raise ValueError(f"AdaptiveHalting.epsilon={self.epsilon} must lie in (0, 1).")

    def validate(self, num_recursions: int) -> None:
        if num_recursions < 2:
            raise ValueError(
                f"AdaptiveHalting needs several steps, not num_recursions={num_recursions}. Use "
                "FixedDepth."
            )

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def has_loop_state(self) -> bool:
        return True

    def scorer_shapes(
        self, hidden_size: int, num_recursions: int
    ) -> tuple[tuple[ScorerMatrix, ...], ...]:
        return (scorer_matrices("linear", hidden_size, 1),) * num_recursions

    def notes_for(self, num_recursions: int) -> tuple[StepNotes, ...]:
        return (StepNotes(plan_size=2),) * num_recursions

    def build(self, hidden_size: int, num_recursions: int) -> "AdaptiveHaltingRouter":
        return AdaptiveHaltingRouter(self, hidden_size, num_recursions)


class MeanState(LoopState):
    """The state of a token, and the weighted sum of its states so far."""

    def begin(self, hidden: Float[Tensor, "*t h"]) -> Float[Tensor, "*t 2h"]:
        return torch.cat([hidden, torch.zeros_like(hidden)], dim=-1)

    def end(self, carried: Float[Tensor, "*t 2h"]) -> Float[Tensor, "*t h"]:
        """The state; that of a token that has halted is its weighted sum."""
        return carried.chunk(2, dim=-1)[0]

    def read(self, step: int, carried: Float[Tensor, "*t 2h"]) -> Float[Tensor, "*t h"]:
        return self.end(carried)

    def update(
        self,
        step: int,
        carried: Float[Tensor, "*t 2h"],
        output: Float[Tensor, "*t h"],
        origin: Float[Tensor, "*t 2h"] | None,
        combine: Combine,
        notes: Tensor | None = None,
    ) -> Float[Tensor, "*t 2h"]:
        return combine(carried, output, origin)


class AdaptiveHaltingRouter(Router):
    """One scorer for all steps. `plan` is the sum of a token's weights, and its weight at the step."""

    def __init__(self, config: AdaptiveHalting, hidden_size: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.config = config
        self.scorer = Scorer("linear", hidden_size, 1, config.bias)
        self.loop_state = MeanState()

    def logits(self, hidden: Tensor, step: int) -> Tensor:
        return self.scorer(hidden)

    def decide(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
    ) -> RoutingDecision:
        assert logits is not None
        probability = logits[..., 0].sigmoid()
        spent = torch.zeros_like(probability) if previous.plan is None else previous.plan[..., 0]
        halts = spent + probability > 1 - self.config.epsilon
        if step == self.num_recursions - 1:
            halts = torch.ones_like(halts)
        weight = torch.where(halts, 1 - spent, probability)
        # Exactly 1 where a token halts, which tells it from one that goes on.
        total = torch.where(halts, torch.ones_like(spent), spent + probability)
        noted = previous.with_plan(torch.stack([total, weight], dim=-1))
        return noted.keep_valid() if step == 0 else noted.keep_where(spent < 1)

    def assess(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        decision: RoutingDecision,
    ) -> RoutingDecision:
        total, weight = self._plan(decision)
        pondered = torch.where(total < 1, torch.ones_like(weight), 1 + weight)
        if decision.tokens.is_padding is not None:
            pondered = pondered.masked_fill(decision.tokens.is_padding, 0)
        cost = pondered.sum() / (decision.tokens.sequence_length * pondered.shape[1])
        losses = {"ponder_cost": self.config.ponder_cost * cost} if self.config.ponder_cost else {}
        return decision.with_losses(losses, {"ponder_cost": cost.detach()})

    def combine(
        self,
        step: int,
        selected: Tensor,
        output: Tensor,
        decision: RoutingDecision,
        origin: Tensor | None,
    ) -> Tensor:
        total, weight = self._plan(decision)
        mean = selected.chunk(2, dim=-1)[1] + weight[..., None].to(output.dtype) * output
        state = torch.where((total < 1)[..., None], output, mean)
        return torch.cat([state, mean], dim=-1)

    @staticmethod
    def _plan(decision: RoutingDecision) -> tuple[Tensor, ...]:
        assert decision.plan is not None
        return decision.plan.unbind(dim=-1)
