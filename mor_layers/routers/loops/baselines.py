"""Routers without learned parameters: the baselines that an adaptive depth has to beat."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mor_layers.routers.base import Router, RouterConfig
from mor_layers.routers.capacity import checked_capacity_factors
from mor_layers.routers.declarations import PublishedRouter, StepNotes
from mor_layers.routers.registry import register_router
from mor_layers.selection import RoutingDecision
from mor_layers.settings import check_types


@register_router("fixed_depth")
@dataclass(frozen=True)
class FixedDepth(RouterConfig):
    """Every token runs every step: the plain recursive transformer, `x <- f(x)`."""

    def capacity_factors_for(self, num_recursions: int) -> tuple[float, ...]:
        return (1.0,) * num_recursions

    @property
    def repeats_layers(self) -> bool:
        return True

    @property
    def replaces_states(self) -> bool:
        return True

    @property
    def has_fixed_capacities(self) -> bool:
        return True

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def lets_tokens_exit(self) -> bool:
        return False

    def notes_for(self, num_recursions: int) -> tuple[StepNotes, ...]:
        return (StepNotes(),) * num_recursions

    def published_for(self, num_recursions: int) -> PublishedRouter:
        return PublishedRouter({"enable": False}, "every_pass")

    def build(self, hidden_size: int, num_recursions: int) -> "FixedDepthRouter":
        return FixedDepthRouter(num_recursions)


class FixedDepthRouter(Router):
    """Keeps every token."""

    draws = False

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
    """Each step keeps a random share of its candidates; their new state is the block's output."""

    capacity_factors: tuple[float, ...] | None = None
    """Share of the sequence kept at each step, in (0, 1], never rising. Default: (N_r-r+1)/N_r."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.capacity_factors is not None:
            checked_capacity_factors(self.capacity_factors, len(self.capacity_factors))

    def validate(self, num_recursions: int) -> None:
        checked_capacity_factors(self.capacity_factors, num_recursions)

    def capacity_factors_for(self, num_recursions: int) -> tuple[float, ...]:
        return checked_capacity_factors(self.capacity_factors, num_recursions)

    @property
    def has_fixed_capacities(self) -> bool:
        return True

    def notes_for(self, num_recursions: int) -> tuple[StepNotes, ...]:
        return (StepNotes(),) * num_recursions

    def build(self, hidden_size: int, num_recursions: int) -> "RandomDepthRouter":
        return RandomDepthRouter(self, num_recursions)


class RandomDepthRouter(Router):
    """Draws from torch's generator, or, with `causal=True`, from each token's position alone.

    Generation therefore makes the same decisions as a forward pass over the whole sequence.
    """

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
        positions, share = previous.tokens.positions, self.capacity_factors[step]
        if causal and share == 1.0:  # a draw would advance the caller's generator
            return previous.keep_valid()
        if causal:
            before = self.capacity_factors[step - 1] if step else 1.0
            return previous.keep_where(_scattered(positions, step) * before < share)
        return previous.keep_top(torch.rand(positions.shape, device=positions.device), share)

    def tune(self, shares: tuple[float, ...], observe: Callable[[int], Tensor]) -> None:
        self.capacity_factors = shares


def _scattered(positions: Int[Tensor, "n b"], step: int) -> Float[Tensor, "n b"]:
    """A pseudo-random number in [0, 1) for each position and the step (after SplitMix64)."""
    state = (positions + 1) * -0x61C8864680B583EB + (step + 1) * 0x2545F4914F6CDD1D
    for factor in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * factor
    return ((state >> 40) & 0xFFFFFF).float() / 0x1000000
