"""Routers that learn nothing: what an adaptive depth has to beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mor_layers.routers.base import (
    Router,
    RouterConfig,
    checked_capacity_factors,
    register_router,
)
from mor_layers.routing import RoutingDecision


@register_router("fixed_depth")
@dataclass(frozen=True)
class FixedDepth(RouterConfig):
    """Every token runs every step: the plain recursive transformer, `x <- f(x)`."""

    def capacity_factors_for(self, num_recursions: int) -> tuple[float, ...]:
        return (1.0,) * num_recursions

    def build(self, hidden_size: int, num_recursions: int) -> "FixedDepthRouter":
        return FixedDepthRouter(num_recursions)


class FixedDepthRouter(Router):
    """Keeps every token."""

    def decide(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
    ) -> RoutingDecision:
        return previous.keep_valid()


@register_router("random_depth")
@dataclass(frozen=True)
class RandomDepth(RouterConfig):
    """Each step keeps a random share of its candidates, which take the block's output as it is."""

    capacity_factors: tuple[float, ...] | None = None
    """Share of the sequence kept at each step, in (0, 1], never rising. Default: (N_r-r+1)/N_r."""

    def __post_init__(self) -> None:
        if self.capacity_factors is not None:
            checked_capacity_factors(self.capacity_factors, len(self.capacity_factors))

    def validate(self, num_recursions: int) -> None:
        checked_capacity_factors(self.capacity_factors, num_recursions)

    def capacity_factors_for(self, num_recursions: int) -> tuple[float, ...]:
        return checked_capacity_factors(self.capacity_factors, num_recursions)

    def build(self, hidden_size: int, num_recursions: int) -> "RandomDepthRouter":
        return RandomDepthRouter(self, num_recursions)


class RandomDepthRouter(Router):
    """Draws from torch's generator; with `causal=True` each token is drawn on its own."""

    def __init__(self, config: RandomDepth, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.capacity_factors = checked_capacity_factors(config.capacity_factors, num_recursions)

    def decide(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
    ) -> RoutingDecision:
        draws = torch.rand(previous.tokens.shape, device=previous.tokens.positions.device)
        share = self.capacity_factors[step]
        if causal and share < 1.0:
            before = self.capacity_factors[step - 1] if step else 1.0
            is_selected = draws < share / before
            if previous.tokens.is_padding is not None:
                is_selected = is_selected & ~previous.tokens.is_padding
            return previous.keep_where(is_selected)
        return previous.keep_top(draws, share)
