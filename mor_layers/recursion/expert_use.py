"""What the experts of a layer did at a step of a recursion.

Legend: `e` experts.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ExpertUse:
    """What the experts of one layer did in one step; padding never counts."""

    load: Float[Tensor, " e"]
    """Tokens that each expert computed."""
    dropped: Float[Tensor, " e"]
    """Tokens that each expert turned away."""
    losses: dict[str, Tensor]
    """Auxiliary losses by name, multiplied by their coefficients and divided by the steps."""
    metrics: dict[str, Tensor]
    """The same losses as they are, detached."""
    histogram: Float[Tensor, " bins"] | None = None
    """Probabilities around the width threshold, where one is held in training."""
