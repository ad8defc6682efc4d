"""Which weights run at which depth: the four sharing schemes of Mixture-of-Recursions.

With 6 unrolled layers and 3 recursions (capital letters are distinct weights):

    cycle            A B | A B | A B
    sequence         A A A | B B B
    middle_cycle     first | A B | A B | A B | last      (8 unrolled layers)
    middle_sequence  first | A A A | B B B | last        (8 unrolled layers)

The number of layers before and after the recursion can also be set explicitly, under any scheme.
With `prelude_layers=2` and `coda_layers=1`, `cycle` and `middle_cycle` both run

    first second | A B | A B | A B | last                (9 unrolled layers)

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
        ValueError: the scheme is unknown, a number is below 1, or the layers cannot be divided into
            equal recursions; the message names the nearest numbers that can.
    """

    num_unrolled_layers: int
    """Depth counted with repeats, prelude and coda included."""
    num_recursions: int
    """How many times the shared layers run (N_r in the paper)."""
    sharing: Sharing
    """The sharing scheme, which determines the order of the repeats."""
    prelude_layers: int | None = None
    """Unshared layers before the recursion; None: 1 in the `middle` schemes, else 0."""
    coda_layers: int | None = None
    """Unshared layers after the recursion; None: 1 in the `middle` schemes, else 0."""

    def __post_init__(self) -> None:
        require_choice("SharingSchedule", "sharing", self.sharing, SHARING_SCHEMES)
        require_lengths(self.prelude_layers, self.coda_layers)
        if self.num_recursions < 1:
            raise ValueError(f"num_recursions={self.num_recursions} must be at least 1.")
        shared = self.num_unrolled_layers - self.num_unshared
        if shared < self.num_recursions or shared % self.num_recursions:
            raise ValueError(
                f"cannot split {max(shared, 0)} shared layers into {self.num_recursions} equal "
                f"recursions (num_unrolled_layers={self.num_unrolled_layers}, "
                f"sharing={self.sharing!r}{self._given_lengths}). Use {self._nearest(shared)}."
            )

    @property
    def prelude(self) -> int:
        """Unshared layers before the recursion."""
        return self._of_scheme if self.prelude_layers is None else self.prelude_layers

    @property
    def coda(self) -> int:
        """Unshared layers after the recursion."""
        return self._of_scheme if self.coda_layers is None else self.coda_layers

    @property
    def num_unshared(self) -> int:
        """Layers outside the recursion."""
        return self.prelude + self.coda

    @property
    def has_published_ends(self) -> bool:
        """Whether prelude and coda are as long as in the paper's scheme of this name."""
        return self.prelude == self.coda == self._of_scheme

    @property
    def block_size(self) -> int:
        """Number of layers in the shared block (K)."""
        return (self.num_unrolled_layers - self.num_unshared) // self.num_recursions

    @property
    def num_blocks(self) -> int:
        """Number of blocks: a step runs a whole block, or each layer repeats by itself."""
        return 1 if self.is_cyclic else self.block_size

    @property
    def num_unique_layers(self) -> int:
        """Number of layers with distinct weights in the whole model."""
        return self.num_unshared + self.block_size

    @property
    def is_cyclic(self) -> bool:
        """Whether a step runs the whole block, which token routing requires."""
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

    @property
    def _of_scheme(self) -> int:
        return end_layers(self.sharing)

    @property
    def _given_lengths(self) -> str:
        given = {"prelude_layers": self.prelude_layers, "coda_layers": self.coda_layers}
        return "".join(f", {name}={value}" for name, value in given.items() if value is not None)

    def _nearest(self, shared: int) -> str:
        below = shared - shared % self.num_recursions
        fixed = self.num_unshared
        if below < self.num_recursions:
            return str(self.num_recursions + fixed)
        return f"{below + fixed} or {below + self.num_recursions + fixed}"


def end_layers(sharing: Sharing) -> int:
    """Unshared layers at either end of a recursion where their number is not set."""
    return 1 if sharing.startswith("middle") else 0


def require_lengths(prelude_layers: int | None, coda_layers: int | None) -> None:
    """Raise ValueError if the prelude or coda is given a negative number of layers."""
    for name, value in (("prelude_layers", prelude_layers), ("coda_layers", coda_layers)):
        if value is not None and value < 0:
            raise ValueError(
                f"{name}={value} must be at least 0, or None for as many as the sharing scheme has."
            )
