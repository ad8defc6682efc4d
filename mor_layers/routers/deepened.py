"""A router with more steps than it was trained for.

The additional steps are inserted before the last one. The rule of the last step decides which tokens
run them, and these tokens are combined as in the step before the last.

Legend: `b` batch, `n` candidates of a step, `k` tokens selected, `h` hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mor_layers.routers.base import Router, RouterConfig
from mor_layers.routers.declarations import ScorerMatrix, StepNotes
from mor_layers.routers.registry import register_router
from mor_layers.selection import RoutingDecision
from mor_layers.settings import check_types


@register_router("deepened")
@dataclass(frozen=True)
class Deepened(RouterConfig):
    """Settings of a router with more steps than it was trained for."""

    router: RouterConfig
    """Settings that the router was trained with."""
    extra_steps: int
    """How many of `num_recursions` steps the router was not trained for. At least 1."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.extra_steps < 1:
            raise ValueError(f"Deepened.extra_steps={self.extra_steps} must be at least 1.")
        if isinstance(self.router, Deepened):
            raise ValueError(
                f"Deepened.router={self.router} is deepened already. Raise its extra_steps instead."
            )

    def validate(self, num_recursions: int) -> None:
        if num_recursions <= self.extra_steps:
            raise ValueError(
                f"Deepened.extra_steps={self.extra_steps} leaves none of num_recursions="
                f"{num_recursions} to have been trained. Use at most {num_recursions - 1}."
            )
        self.router.validate(num_recursions - self.extra_steps)

    @property
    def needs_updates(self) -> bool:
        return self.router.needs_updates

    def capacity_factors_for(self, num_recursions: int) -> tuple[float, ...] | None:
        factors = self.router.capacity_factors_for(num_recursions - self.extra_steps)
        return None if factors is None else self._continued(factors)

    @property
    def rounds_capacities_to(self) -> int:
        return self.router.rounds_capacities_to

    def mean_experts_for(self, num_recursions: int) -> tuple[float, ...] | None:
        means = self.router.mean_experts_for(num_recursions - self.extra_steps)
        return None if means is None else self._continued(means)

    @property
    def is_causal(self) -> bool:
        return self.router.is_causal

    @property
    def lets_tokens_exit(self) -> bool:
        return self.router.lets_tokens_exit

    def scorer_shapes(
        self, hidden_size: int, num_recursions: int
    ) -> tuple[tuple[ScorerMatrix, ...], ...]:
        trained_steps = num_recursions - self.extra_steps
        return self._continued(self.router.scorer_shapes(hidden_size, trained_steps))

    def notes_for(self, num_recursions: int) -> tuple[StepNotes, ...]:
        return self._continued(self.router.notes_for(num_recursions - self.extra_steps))

    def build(self, hidden_size: int, num_recursions: int) -> "DeepenedRouter":
        trained = self.router.build(hidden_size, num_recursions - self.extra_steps)
        return DeepenedRouter(trained, self.extra_steps)

    def _continued[T](self, values: tuple[T, ...]) -> tuple[T, ...]:
        """Values declared for the trained steps, with the last one repeated for the additional
        steps.
        """
        return values + values[-1:] * self.extra_steps


class DeepenedRouter(Router):
    """Asks the trained router, and uses its last step for all additional steps."""

    def __init__(self, trained: Router, extra_steps: int) -> None:
        super().__init__(trained.num_recursions + extra_steps)
        self.trained = trained
        self.combines_with_origin = trained.combines_with_origin  # type: ignore[misc]

    def logits(self, hidden: Tensor, step: int) -> Tensor | None:
        return self.trained.logits(hidden, self._trained_step(step))

    def decide(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
    ) -> RoutingDecision:
        return self.trained.decide(logits, self._trained_step(step), previous, causal)

    def assess(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        decision: RoutingDecision,
    ) -> RoutingDecision:
        return self.trained.assess(logits, self._trained_step(step), previous, decision)

    def combine(
        self,
        step: int,
        selected: Tensor,
        output: Tensor,
        decision: RoutingDecision,
        origin: Tensor | None,
    ) -> Tensor:
        last = self.trained.num_recursions - 1
        if step == self.num_recursions - 1:
            step = last
        elif step >= last:  # its tokens continue, as at the step before the last
            step = max(0, last - 1)
        return self.trained.combine(step, selected, output, decision, origin)

    def advance(self, tokens_per_step: Tensor) -> None:
        self.trained.advance(tokens_per_step[: self.trained.num_recursions])

    def adjust(self, observations: dict[str, Tensor]) -> None:
        self.trained.adjust(observations)

    def tune(self, shares: tuple[float, ...], observe: Callable[[int], Tensor]) -> None:
        self.trained.tune(shares[: self.trained.num_recursions], observe)

    def _trained_step(self, step: int) -> int:
        return min(step, self.trained.num_recursions - 1)
