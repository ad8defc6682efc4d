"""The size of the tensors sent between stages if each recursion step is a virtual pipeline stage.

The tensor holds what all tokens carry, then the rows of the tokens in the block, then metadata as raw
bits: the document of each token of the sequence if there are several, and for each token in the block
its position, gate, router plan and notes. `mor_megatron.pipeline.state` packs it.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Self

import torch

from mor_layers import RecursionConfig
from mor_layers.selection import capacity

WORD_BYTES = 4
"""Bytes of an int32 or fp32, the formats of positions, gates and plans."""


@dataclass(frozen=True)
class CarriedRows:
    """What is sent between stages, and how many rows it needs. The same on all stages."""

    hidden_size: int
    itemsize: int
    """Bytes of an element of hidden states."""
    ranks: int
    """Number of ranks that split the sequence: those of context parallelism, times those of tensor
    parallelism with sequence parallelism."""
    has_gates: tuple[bool, ...]
    """Whether the decisions of each step have gates."""
    plan_sizes: tuple[int, ...]
    """Numbers per token in the router's plan (p) at each step."""
    shares: tuple[float, ...] | None = None
    """Share of the sequence that runs each step, or None if it depends on the tokens."""
    capacity_multiple: int = 1
    """What the number of tokens of a share is rounded up to a multiple of."""
    has_documents: bool = False
    """Whether the sequences of a batch may have several documents, or padding."""
    states: int = 1
    """Hidden states that a token carries between steps: several with a `LoopState`."""
    num_notes: int = 0
    """Numbers per token in the notes of the `LoopState` (m)."""
    context: int = 1
    """Number of context-parallel ranks."""
    replaces_states: bool = False
    """Whether a step replaces the state that entered it, so that nobody needs that one afterwards."""

    @classmethod
    def of(
        cls,
        recursion: RecursionConfig,
        hidden_size: int,
        itemsize: int,
        ranks: int,
        documents: bool,
        context: int = 1,
    ) -> Self:
        """The layout for a recursion, from what its router declares to note about tokens."""
        router, steps = recursion.router, recursion.num_recursions
        notes, shares = router.notes_for(steps), None
        is_fixed = router.has_fixed_capacities and not router.truncates_gradients
        if is_fixed and not documents:  # otherwise, each tensor says what it holds
            shares = router.capacity_factors_for(steps)
        return cls(
            hidden_size,
            itemsize,
            ranks,
            tuple(step.has_gates for step in notes),
            tuple(step.plan_size for step in notes),
            shares,
            router.rounds_capacities_to,
            documents,
            *_loop_state_sizes(recursion),
            context,
            router.replaces_states,
        )

    @property
    def is_bare(self) -> bool:
        """Whether all tokens run all steps, and only their hidden states in the block are sent."""
        has_notes = any(self.has_gates) or any(self.plan_sizes) or self.num_notes or self.states > 1
        runs_all = self.shares is not None and min(self.shares) == 1.0
        return runs_all and self.replaces_states and not has_notes

    def carried_length(self, sequence_length: int) -> int:
        """The length to pass to the schedule instead of `sequence_length`, over all ranks."""
        if self.is_bare:
            return sequence_length
        if sequence_length % self.multiple:
            raise ValueError(
                f"sequence length {sequence_length} is not divisible by {self.multiple}, as its "
                f"{self.ranks} sequence-parallel and context-parallel ranks need. Use a multiple of "
                f"{self.multiple}."
            )
        rows = self.states * self.shard(sequence_length + self.room(sequence_length))
        total = (rows + self.bit_rows(sequence_length)) * self.ranks
        return -(-total // self.multiple) * self.multiple

    @property
    def multiple(self) -> int:
        """What lengths are multiples of. Megatron cuts sequences, and rotary tables of carried length,
        into two chunks for each context-parallel rank.
        """
        return math.lcm(self.ranks, 2 * self.context) if self.context > 1 else self.ranks

    def sequence_length(self, carried_rows: int) -> int:
        """The sequence length for which a rank sends `carried_rows` rows.

        Raises:
            ValueError: no sequence length gives this number of rows.
        """
        return _sequence_length(self, carried_rows)

    def width(self, step: int, sequence_length: int) -> int | None:
        """Number of tokens that run a step, or None if only the sent tensor determines it."""
        if self.shares is None:
            return None
        return capacity(self.shares[step], sequence_length, self.capacity_multiple)

    def room(self, sequence_length: int) -> int:
        """Number of tokens in the block that the tensor has room for."""
        return self.width(0, sequence_length) or sequence_length

    def shard(self, rows: int) -> int:
        """Number of rows on each rank, rounded up."""
        return -(-rows // self.ranks)

    def bit_rows(self, sequence_length: int) -> int:
        """Number of rows that hold the metadata."""
        notes = max(g + p for g, p in zip(self.has_gates, self.plan_sizes, strict=True))
        words = 1 + self.room(sequence_length) * (1 + notes + self.num_notes)
        words += sequence_length * self.has_documents
        return -(-words * WORD_BYTES // (self.itemsize * self.hidden_size))


def _loop_state_sizes(recursion: RecursionConfig) -> tuple[int, int]:
    """Hidden states that a token carries, and numbers in its notes, found on one token."""
    router = recursion.router
    if not (recursion.hyper_connections or recursion.history or router.has_loop_state):
        return 1, 0
    size = 4
    with torch.random.fork_rng(devices=()), torch.no_grad(), torch.device("cpu"):
        state = recursion.build_loop_state(size)
        assert state is not None
        carried = state.begin(torch.zeros(1, 1, size))
        notes = state.notes(0, carried)
    return carried.shape[-1] // size, 0 if notes is None else notes.shape[-1]


@cache
def _sequence_length(layout: CarriedRows, carried_rows: int) -> int:
    total = carried_rows * layout.ranks
    for length in range(total - total % layout.multiple, 0, -layout.multiple):
        if layout.carried_length(length) == total:
            return length
    raise ValueError(
        f"the schedule sends {total} rows between stages, which no sequence length gives. Call "
        "recursion_forward_backward, or pass seq_length=carried_length(chunks, s) to the schedule."
    )
