"""How many rows travel between stages where each recursion step is a virtual pipeline stage.

Behind the sequence travel the rows of the tokens in the block, and bits: for each of those tokens
its position, its gate and what the router planned. `mor_megatron.pipeline.state` packs them.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Self

from mor_layers import RecursionConfig

WORD_BYTES = 4
"""Bytes of an int32 or fp32, in which positions, gates and plans travel."""


@dataclass(frozen=True)
class CarriedRows:
    """What travels and how many rows it takes; alike on all stages."""

    hidden_size: int
    itemsize: int
    """Bytes of an element of hidden states."""
    ranks: int
    """Tensor-parallel ranks that share the sequence; 1 without sequence parallelism."""
    has_gates: tuple[bool, ...]
    """At each step, whether decisions have gates."""
    plan_sizes: tuple[int, ...]
    """At each step, the numbers planned per token (p)."""
    shares: tuple[float, ...] | None = None
    """Share of the sequence that runs each step; None where it depends on the tokens."""
    has_documents: bool = False
    """Whether batches may hold several documents in a sequence, or padding."""

    @classmethod
    def of(
        cls,
        recursion: RecursionConfig,
        hidden_size: int,
        itemsize: int,
        ranks: int,
        documents: bool,
    ) -> Self:
        """The layout for what the recursion's router says that it notes about tokens."""
        router, steps = recursion.router, recursion.num_recursions
        notes, shares = router.notes_for(steps), None
        if router.has_fixed_capacities and not documents:
            shares = router.capacity_factors_for(steps)
        return cls(
            hidden_size,
            itemsize,
            ranks,
            tuple(step.has_gates for step in notes),
            tuple(step.plan_size for step in notes),
            shares,
            documents,
        )

    @property
    def is_bare(self) -> bool:
        """Whether all tokens run all steps and nothing but their states travels."""
        has_notes = any(self.has_gates) or any(self.plan_sizes)
        return self.shares is not None and min(self.shares) == 1.0 and not has_notes

    def carried_length(self, sequence_length: int) -> int:
        """What the schedule must be told instead of `sequence_length`, over all ranks."""
        if self.is_bare:
            return sequence_length
        if sequence_length % self.ranks:
            raise ValueError(
                f"sequence length {sequence_length} does not divide by the {self.ranks} ranks of "
                "sequence parallelism. Use a multiple of their number."
            )
        rows = self.shard(self.room(sequence_length)) + self.bit_rows(sequence_length)
        return sequence_length + rows * self.ranks

    def sequence_length(self, carried_rows: int) -> int:
        """The sequence length behind a rank's `carried_rows` rows.

        Raises:
            ValueError: no sequence has that many.
        """
        return _sequence_length(self, carried_rows)

    def width(self, step: int, sequence_length: int) -> int | None:
        """Tokens that run a step; None where only the tensor itself says it."""
        if self.shares is None:
            return None
        return max(1, math.floor(self.shares[step] * sequence_length))

    def room(self, sequence_length: int) -> int:
        """Tokens that rows are kept free for."""
        return self.width(0, sequence_length) or sequence_length

    def shard(self, rows: int) -> int:
        """Rows of a rank."""
        return -(-rows // self.ranks)

    def bit_rows(self, sequence_length: int) -> int:
        """Rows that hold bits."""
        notes = max(g + p for g, p in zip(self.has_gates, self.plan_sizes, strict=True))
        words = 1 + self.room(sequence_length) * (1 + 2 * self.has_documents + notes)
        return -(-words * WORD_BYTES // (self.itemsize * self.hidden_size))


@cache
def _sequence_length(layout: CarriedRows, carried_rows: int) -> int:
    total = carried_rows * layout.ranks
    for length in range(total, 0, -layout.ranks):
        if layout.carried_length(length) == total:
            return length
    raise ValueError(
        f"no sequence fills the {total} rows that the schedule sends from stage to stage. Run it "
        "through recursion_forward_backward, or give it seq_length=carried_length(chunks, s)."
    )
