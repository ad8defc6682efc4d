"""RandomLoops: every token runs as many steps as were drawn for the optimizer step.

    uniform              every number of steps from the smallest to the largest is equally likely
    log_normal_poisson   n ~ Poisson(exp(τ)) + 1, τ ~ N(log m - σ²/2, σ), σ = 1/2, kept within both
    largest              the largest, which a curriculum lets grow

Sources: Geiping et al. 2025 (arXiv 2502.05171, Huginn), section 3.3, for the log-normal Poisson
distribution and for backpropagation through the last steps only, eight of them. Loop curricula are in
Dory (arXiv 2611.03998). Where we differ: the number of steps has a largest value, `num_recursions`.

Legend: `n` loops, `r` steps, numbered from 0.
"""

import math
from dataclasses import dataclass
from functools import cache
from random import Random
from statistics import NormalDist
from typing import Literal, get_args

import torch
from torch import Tensor

from mor_layers.routers.base import Router, RouterConfig
from mor_layers.routers.declarations import StepNotes
from mor_layers.routers.registry import register_router
from mor_layers.selection import RoutingDecision
from mor_layers.settings import check_types, require_choice, require_not_negative

Draw = Literal["uniform", "log_normal_poisson", "largest"]
_SPREAD = 0.5
"""σ of the log-normal Poisson distribution."""


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
    """Smallest number of steps. At least 1."""
    seed: int = 0
    """Seed of the draws."""
    draw: Draw = "uniform"
    """How the number of steps is drawn: uniform, log_normal_poisson, or always the largest."""
    mean: float | None = None
    """log_normal_poisson: mean of `n - 1`, without bounds (m). Above 0. Otherwise None."""
    curriculum_steps: int = 0
    """Optimizer steps over which the largest number of steps grows linearly from `min_recursions` to
    `num_recursions`. 0: no curriculum."""
    backward_steps: int | None = None
    """Gradients go through this many steps, the last that run; steps before them keep no activations.
    At least 1; None: through all of them."""

    def __post_init__(self) -> None:
        check_types(self)
        require_choice("RandomLoops", "draw", self.draw, get_args(Draw))
        require_not_negative("RandomLoops", curriculum_steps=self.curriculum_steps)
        if (self.draw == "log_normal_poisson") != (self.mean is not None):
            raise ValueError(
                f"RandomLoops.mean={self.mean} with draw={self.draw!r}: log_normal_poisson needs a "
                "mean, and the others have none."
            )
        if self.mean is not None and not 0 < self.mean <= 1000:
            raise ValueError(f"RandomLoops.mean={self.mean} must lie in (0, 1000].")
        if self.backward_steps is not None and self.backward_steps < 1:
            raise ValueError(
                f"RandomLoops.backward_steps={self.backward_steps} must be at least 1, or None for all."
            )
        if self.draw == "largest" and not (self.curriculum_steps or self.backward_steps):
            raise ValueError(
                "RandomLoops.draw='largest' without curriculum_steps and backward_steps draws nothing. "
                "Use FixedDepth."
            )

    def validate(self, num_recursions: int) -> None:
        if not 1 <= self.min_recursions < num_recursions:
            raise ValueError(
                f"RandomLoops.min_recursions={self.min_recursions} must be at least 1, and below "
                f"num_recursions={num_recursions}. Use FixedDepth for one number of steps."
            )
        if self.backward_steps is not None and self.backward_steps >= num_recursions:
            raise ValueError(
                f"RandomLoops.backward_steps={self.backward_steps} must be below num_recursions="
                f"{num_recursions}. Leave it out for gradients through all steps."
            )

    @property
    def needs_updates(self) -> bool:
        return True

    @property
    def truncates_gradients(self) -> bool:
        return self.backward_steps is not None

    def largest(self, num_recursions: int, training_step: int) -> int:
        """The largest number of steps during the optimizer step `training_step` (0-based)."""
        if training_step >= self.curriculum_steps:
            return num_recursions
        more = (num_recursions - self.min_recursions) * training_step // self.curriculum_steps
        return self.min_recursions + more

    def drawn(self, num_recursions: int, training_step: int) -> int:
        """The number of steps during the optimizer step `training_step` (0-based)."""
        largest = self.largest(num_recursions, training_step)
        generator = Random(f"{self.seed} {training_step}")
        if self.draw == "uniform":
            return generator.randint(self.min_recursions, largest)
        if self.mean is None:
            return largest
        rate = math.exp(generator.gauss(_center(self.mean), _SPREAD))
        arrivals, time = 0, generator.expovariate()
        while time < rate:
            arrivals, time = arrivals + 1, time + generator.expovariate()
        return min(max(arrivals + 1, self.min_recursions), largest)

    def probabilities(self, num_recursions: int, largest: int) -> tuple[float, ...]:
        """The probability of each number of steps, from 0 to `num_recursions`.

        Args:
            largest: the largest number of steps that may be drawn.
        """
        numbers = range(self.min_recursions, largest + 1)
        if self.draw == "uniform":
            found = {number: 1 / len(numbers) for number in numbers}
        elif self.mean is None:
            found = {largest: 1.0}
        else:
            below = [_share_up_to(self.mean, number) for number in numbers[:-1]] + [1.0]
            found = dict(zip(numbers, map(float.__sub__, below, [0.0, *below]), strict=False))
        return tuple(found.get(number, 0.0) for number in range(num_recursions + 1))

    def capacity_factors_for(self, num_recursions: int) -> tuple[float, ...]:
        return self._shares(self.probabilities(num_recursions, num_recursions))

    def capacity_factors_at(self, num_recursions: int, training_step: int) -> tuple[float, ...]:
        largest = self.largest(num_recursions, training_step)
        return self._shares(self.probabilities(num_recursions, largest))

    def trained_shares_for(self, num_recursions: int) -> tuple[float, ...]:
        if self.backward_steps is None:
            return (1.0,) * num_recursions
        drawn = self.probabilities(num_recursions, num_recursions)
        runs = self._shares(drawn)
        trained = (sum(drawn[r + 1 : r + 1 + self.backward_steps]) for r in range(num_recursions))
        return tuple(t / run if run else 1.0 for t, run in zip(trained, runs, strict=True))

    @staticmethod
    def _shares(drawn: tuple[float, ...]) -> tuple[float, ...]:
        """Probability that each step runs. A sum of shares may exceed 1 by rounding."""
        return tuple(min(1.0, sum(drawn[step + 1 :])) for step in range(len(drawn) - 1))

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
        return self.config.drawn(self.num_recursions, self._training_steps)

    @property
    def first_trained_step(self) -> int:
        if self.config.backward_steps is None or not self.training:
            return 0
        return max(0, self.num_loops - self.config.backward_steps)

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


def _center(mean: float) -> float:
    return math.log(mean) - _SPREAD**2 / 2


@cache
def _share_up_to(mean: float, count: int) -> float:
    """P(Poisson(exp(τ)) < count), averaged over 1,000 equally likely values of τ."""
    center = NormalDist(_center(mean), _SPREAD)
    rates = [math.exp(center.inv_cdf((place + 0.5) / 1000)) for place in range(1000)]
    terms = (
        math.exp(k * math.log(rate) - rate - math.lgamma(k + 1))
        for rate in rates
        for k in range(count)
    )
    return min(1.0, math.fsum(terms) / 1000)
