"""DampedLoops: every token runs every step, and each moves its state only part of the way.

    x <- x + α · (f(x) - x)

A layer with a residual is a step of Euler's method along the depth. Running pretrained layers N times at
full length takes the state to where the layers after them have never seen it; N steps of length α = 1/N
end about where one step does, by a finer path. So a pretrained model can be looped without training.

Source: "Training-Free Looped Transformers" (arXiv 2605.23872): its block mode with cycle sharing, and
its layer mode, in which each layer repeats before the next one runs, with sequence sharing. Where we
differ: its solvers of higher order are not implemented.

Legend: `b` batch, `k` tokens, `h` hidden.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mor_layers.routers.base import Router, RouterConfig
from mor_layers.routers.declarations import StepNotes
from mor_layers.routers.registry import register_router
from mor_layers.selection import RoutingDecision
from mor_layers.settings import check_types


@register_router("damped_loops")
@dataclass(frozen=True)
class DampedLoops(RouterConfig):
    """Every token runs every step: `x <- x + damping · (f(x) - x)`."""

    damping: float | None = None
    """How far a step moves the state towards the block's output, in (0, 1]. None: 1 / num_recursions.
    1 is FixedDepth."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.damping is not None and not 0 < self.damping <= 1:
            raise ValueError(
                f"DampedLoops.damping={self.damping} must lie in (0, 1], or be None for one by the "
                "number of recursions."
            )

    def validate(self, num_recursions: int) -> None:
        if num_recursions < 2:
            raise ValueError(
                f"DampedLoops needs several steps, not num_recursions={num_recursions}. Use FixedDepth."
            )

    def capacity_factors_for(self, num_recursions: int) -> tuple[float, ...]:
        return (1.0,) * num_recursions

    @property
    def has_fixed_capacities(self) -> bool:
        return True

    @property
    def repeats_layers(self) -> bool:
        return True

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def lets_tokens_exit(self) -> bool:
        return False

    def notes_for(self, num_recursions: int) -> tuple[StepNotes, ...]:
        return (StepNotes(),) * num_recursions

    def build(self, hidden_size: int, num_recursions: int) -> "DampedLoopsRouter":
        self.validate(num_recursions)
        return DampedLoopsRouter(self, num_recursions)


class DampedLoopsRouter(Router):
    """Keeps every token."""

    draws = False

    def __init__(self, config: DampedLoops, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.damping = 1 / num_recursions if config.damping is None else config.damping

    def decide(
        self, logits: Tensor | None, step: int, previous: RoutingDecision, causal: bool = False
    ) -> RoutingDecision:
        return previous.keep_valid()

    def combine(
        self,
        step: int,
        selected: Float[Tensor, "k b h"],
        output: Float[Tensor, "k b h"],
        decision: RoutingDecision,
        origin: Float[Tensor, "k b h"] | None,
    ) -> Float[Tensor, "k b h"]:
        return torch.lerp(selected, output, self.damping)
