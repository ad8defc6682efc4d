"""Settings of multi-token prediction."""

import math
from dataclasses import dataclass

from mor_layers.models.limits import MOST_LAYERS
from mor_layers.settings import check_types


@dataclass(frozen=True)
class MultiTokenPrediction:
    """Heads that predict further tokens, in training and as drafts; see `prediction_heads`."""

    num_heads: int = 1
    """How many tokens are predicted beyond the next one. At least 1."""
    loss_coefficient: float = 0.1
    """Weight of the mean loss of the heads. 0 or more."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 1 <= self.num_heads <= MOST_LAYERS:
            raise ValueError(f"num_heads={self.num_heads} must be in 1..{MOST_LAYERS}.")
        if not 0 <= self.loss_coefficient < math.inf:
            raise ValueError(
                f"loss_coefficient={self.loss_coefficient} must be 0 or more, and finite."
            )
