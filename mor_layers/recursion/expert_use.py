"""Statistics and losses of the experts of a layer at one recursion step.

Legend: `e` experts.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ExpertUse:
    """Statistics and losses of one layer's experts at one step; padding is not counted."""

    load: Float[Tensor, " e"]
    """Tokens that each expert computed."""
    dropped: Float[Tensor, " e"]
    """Tokens that each expert dropped because it was full."""
    losses: dict[str, Tensor]
    """Auxiliary losses by name, multiplied by their coefficients and divided by the number of steps."""
    metrics: dict[str, Tensor]
    """The same losses without these factors, detached."""
    histogram: Float[Tensor, " bins"] | None = None
    """Histogram of probabilities around the width threshold; None without such a threshold."""
