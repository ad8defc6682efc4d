"""Which weights run at which depth: the four sharing schemes of Mixture-of-Recursions.

With 6 unrolled layers and 3 recursions (capital letters are distinct weights):

    cycle            A B | A B | A B
    sequence         A A A | B B B
    middle_cycle     first | A B | A B | A B | last      (8 unrolled layers)
    middle_sequence  first | A A A | B B B | last        (8 unrolled layers)

Source: Bae et al. 2025 (arXiv 2507.10524), section 2.2.1 and table 1.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from mor_layers.settings import require_choice

Sharing = Literal["cycle", "sequence", "middle_cycle", "middle_sequence"]
SHARING_SCHEMES: tuple[str, ...] = get_args(Sharing)


@dataclass(frozen=True)
class SharingSchedule:
    """How `num_unrolled_layers` layers of computation share fewer layers of weights.

    Raises:
        ValueError: an unknown scheme, a count below 1, or layers that do not divide into equal
            recursions; the message names the nearest counts that do.
    """

    num_unrolled_layers: int
    """Depth counted with repeats, prelude and coda included."""
    num_recursions: int
    """How many times the shared layers run (N_r in the paper)."""
    sharing: Sharing
    """The sharing scheme, which determines the order of the repeats."""

    def __post_init__(self) -> None:
        require_choice("SharingSchedule", "sharing", self.sharing, SHARING_SCHEMES)
        if self.num_recursions < 1:
            raise ValueError(f"num_recursions={self.num_recursions} must be at least 1.")
        shared = self.num_unrolled_layers - self.prelude - self.coda
        if shared < self.num_recursions or shared % self.num_recursions:
            raise ValueError(
                f"cannot split {max(shared, 0)} shared layers into {self.num_recursions} equal "
                f"recursions (num_unrolled_layers={self.num_unrolled_layers}, "
                f"sharing={self.sharing!r}). Use {self._nearest(shared)}."
            )

    @property
    def prelude(self) -> int:
        """Unshared layers before the recursion."""
        return 1 if self.sharing.startswith("middle") else 0

    @property
    def coda(self) -> int:
        """Unshared layers after the recursion."""
        return self.prelude

    @property
    def block_size(self) -> int:
        """Number of layers in the shared block (K)."""
        return (self.num_unrolled_layers - self.prelude - self.coda) // self.num_recursions

    @property
    def num_unique_layers(self) -> int:
        """Number of layers with distinct weights in the whole model."""
        return self.prelude + self.block_size + self.coda

    @property
    def is_cyclic(self) -> bool:
        """Whether a step runs the whole block, which is what token routing needs."""
        return self.sharing in ("cycle", "middle_cycle")

    @property
    def unrolled(self) -> tuple[int, ...]:
        """Index of the unique layer that runs at each depth; length `num_unrolled_layers`."""
        steps, size = range(self.num_recursions), range(self.block_size)
        if self.is_cyclic:
            shared = [self.prelude + layer for _ in steps for layer in size]
        else:
            shared = [self.prelude + layer for layer in size for _ in steps]
        first = list(range(self.prelude))
        last = [self.prelude + self.block_size + i for i in range(self.coda)]
        return tuple(first + shared + last)

    def _nearest(self, shared: int) -> str:
        below = shared - shared % self.num_recursions
        fixed = self.prelude + self.coda
        if below < self.num_recursions:
            return str(self.num_recursions + fixed)
        return f"{below + fixed} or {below + self.num_recursions + fixed}"
