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


class ExpertRecorder:
    """Collects what the experts of every layer do in one pass through the block.

    A layer returns hidden states and nothing else, so that any module can stand in the block. What
    its experts did leaves it here instead: the recorder is the part of a step's context that
    layers write to.
    """

    def __init__(self) -> None:
        self._uses: dict[int, ExpertUse] = {}

    @property
    def uses(self) -> dict[int, ExpertUse]:
        """What was recorded, by layer."""
        return self._uses

    def record(self, layer: int, use: ExpertUse) -> None:
        """Note what the experts of a layer did.

        A pass that is recomputed in the backward pass records the same values once more, so the
        last record of a layer replaces earlier ones.

        Args:
            layer: 0-based index of the layer in the block.
        """
        self._uses[layer] = use
