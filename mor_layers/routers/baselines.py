"""Routers without learned parameters: the baselines that an adaptive depth has to beat."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

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


@register_router("random_loops")
@dataclass(frozen=True)
class RandomLoops(RouterConfig):
    """Fixed depth, where the number of steps is drawn anew for every optimizer step of training.

    The model thus learns to work with any number of steps. All ranks, micro-batches and recomputations
    of an optimizer step draw the same number, because it depends only on `seed` and on how often
    `Router.advance` was called. Skipped steps run on one slot of padding, so that every parameter has
    a gradient. In evaluation all steps run.
    """

    min_recursions: int = 1
    """Smallest number of steps; all numbers up to `num_recursions` are equally likely. At least 1."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        check_types(self)

    def validate(self, num_recursions: int) -> None:
        if not 1 <= self.min_recursions < num_recursions:
            raise ValueError(
                f"RandomLoops.min_recursions={self.min_recursions} must be at least 1, and below "
                f"num_recursions={num_recursions}. Use FixedDepth for one number of steps."
            )

    @property
    def needs_updates(self) -> bool:
        return True

    def capacity_factors_for(self, num_recursions: int) -> tuple[float, ...]:
        choices = num_recursions - self.min_recursions + 1
        return tuple(min(1.0, (num_recursions - r) / choices) for r in range(num_recursions))

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def lets_tokens_exit(self) -> bool:
        return False

    def notes_for(self, num_recursions: int) -> tuple[StepNotes, ...]:
        return (StepNotes(),) * num_recursions

    def build(self, hidden_size: int, num_recursions: int) -> "RandomLoopsRouter":
        self.validate(num_recursions)
        return RandomLoopsRouter(self, num_recursions)


class RandomLoopsRouter(Router):
    """Keeps every token for the number of steps that was drawn."""

    training_steps: Tensor

    def __init__(self, config: RandomLoops, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.config = config
        self.register_buffer("training_steps", torch.zeros((), dtype=torch.int64))
        self._training_steps: int | None = None  # the buffer as the host last saw it

    @property
    def num_loops(self) -> int:
        """The number of steps that run now."""
        if not self.training:
            return self.num_recursions
        if self._training_steps is None:
            self._training_steps = int(self.training_steps)
        draw = Random(f"{self.config.seed} {self._training_steps}")
        return draw.randint(self.config.min_recursions, self.num_recursions)

    def decide(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
    ) -> RoutingDecision:
        if step < self.num_loops:
            return previous.keep_valid()
        return previous.keep_where(torch.zeros_like(previous.tokens.positions, dtype=torch.bool))

    def advance(self, tokens_per_step: Tensor) -> None:
        self.training_steps += 1
        self._training_steps = None

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._training_steps = None


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
