"""Observers of a RecursionBlock: functions that are called for each routed step.

Legend: `b` batch, `n` candidates of a step, `c` logits a token.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mor_layers.selection import RoutingDecision


@dataclass(frozen=True)
class RoutedStep:
    """One call of `RecursionBlock.route`: the inputs of the router and its decision."""

    step: int
    """0-based recursion step."""
    logits: Float[Tensor, "n b c"] | None
    """Logits of all candidates, or None if the router needs none at this step."""
    previous: RoutingDecision
    """The candidates, and what was planned for them."""
    decision: RoutingDecision
    """The tokens that run the step. It has losses and metrics if `route` was called with `assess`."""
    causal: bool
    """Whether a token's depth was allowed to depend only on earlier tokens."""


RoutingObserver = Callable[[RoutedStep], None]
"""Called after each step is routed. It may keep the tensors that it gets but must not change them."""
