"""What a RecursionBlock tells those who watch it route.

Legend: `b` batch, `n` candidates of a step, `c` logits a token.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mor_layers.selection import RoutingDecision


@dataclass(frozen=True)
class RoutedStep:
    """One call of `RecursionBlock.route`: what the router saw, and what it decided."""

    step: int
    """0-based recursion step."""
    logits: Float[Tensor, "n b c"] | None
    """Logits of all candidates; None where the router needs none at this step."""
    previous: RoutingDecision
    """The candidates, and what was planned for them."""
    decision: RoutingDecision
    """Who runs the step; with losses and metrics where the router was asked to assess it."""
    causal: bool
    """Whether the router had to decide by earlier tokens only."""


RoutingObserver = Callable[[RoutedStep], None]
"""Called after each step is routed. It may keep what it is given and must change none of it."""
