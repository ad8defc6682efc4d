"""Tokens on their way through a model that generates, with what travels along.

Legend: `t` tokens in flight, `h` hidden, `p` numbers that a router plans per token.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Some tokens: their states, and what is noted of each."""

    hidden: Float[Tensor, "t h"]
    notes: Int[Tensor, "5 t"]
    """The five lines that the properties name; one tensor, so that taking is one operation."""

    @classmethod
    def of(
        cls, hidden: Tensor, slots: Tensor, steps: Tensor, positions: Tensor, places: Tensor
    ) -> "Rows":
        """Tokens that no cache policy has noted anything about yet."""
        return cls(hidden, torch.stack([slots, steps, positions, places, torch.zeros_like(slots)]))

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """The tokens of all parts, one after another."""
        if len(parts) == 1:
            return parts[0]
        notes = torch.cat([part.notes for part in parts], dim=1)
        return cls(torch.cat([part.hidden for part in parts]), notes)

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def slots(self) -> Int[Tensor, " t"]:
        """The sequence that each belongs to."""
        return self.notes[0]

    @property
    def steps(self) -> Int[Tensor, " t"]:
        """Steps that each has run, which is the 0-based one that it would run next."""
        return self.notes[1]

    @property
    def positions(self) -> Int[Tensor, " t"]:
        """Place of each in its text."""
        return self.notes[2]

    @property
    def places(self) -> Int[Tensor, " t"]:
        """Place of each in its span."""
        return self.notes[3]

    @property
    def entries(self) -> Int[Tensor, " t"]:
        """What the cache policy wants to hear again."""
        return self.notes[4]

    def take(self, index: Int[Tensor, " k"]) -> "Rows":
        """Some of the tokens."""
        return Rows(self.hidden.index_select(0, index), self.notes.index_select(1, index))

    def without(self, slot: int) -> "Rows":
        """The tokens of all other sequences."""
        return self.take((self.slots != slot).nonzero()[:, 0])


@dataclass(frozen=True)
class Pool:
    """Tokens that run the recursion, in the order of steps: those of one step stand together.

    What is done to every token is one operation, whatever step it is at. Only routers, which may
    plan another number of things at every step, are asked about the steps one by one.
    """

    rows: Rows
    counts: tuple[int, ...]
    """Tokens at each step; last come those that have run all of them."""
    plans: tuple[Float[Tensor, "t p"] | None, ...]
    """What the router planned for the tokens of each step; None: nothing."""
    gates: tuple[Float[Tensor, " t"] | None, ...]
    """Of the tokens of each step, what the block's output is multiplied by; None: nothing."""
    origin: Float[Tensor, "t h"] | None = None
    """States that entered the recursion, where the router asks for them."""

    @classmethod
    def at(cls, step: int, num_steps: int, rows: Rows, origin: Tensor | None = None) -> "Pool":
        """Tokens that have all run so many of `num_steps` steps."""
        counts, nothing = [0] * (num_steps + 1), (None,) * (num_steps + 1)
        counts[step] = len(rows)
        return cls(rows, tuple(counts), nothing, nothing, origin)

    def __len__(self) -> int:
        return len(self.rows)

    def origin_of(self, own: slice) -> Float[Tensor, "k h"] | None:
        """States that entered the recursion, of the tokens that stand there."""
        return None if self.origin is None else self.origin[own]

    def parts(self) -> Iterator[tuple[int, slice]]:
        """Each step that has tokens, and where they stand."""
        ends = accumulate(self.counts)
        for step, (end, count) in enumerate(zip(ends, self.counts, strict=True)):
            if count:
                yield step, slice(end - count, end)

    def behind(self, first: "Pool") -> "Pool":
        """The tokens of both; those of `first` are at earlier steps."""
        if not len(first):
            return self
        if not len(self):
            return first
        origin = None
        if first.origin is not None and self.origin is not None:
            origin = torch.cat([first.origin, self.origin])
        here = [count > 0 for count in first.counts]
        return Pool(
            Rows.joined([first.rows, self.rows]),
            tuple(a + b for a, b in zip(first.counts, self.counts, strict=True)),
            _chosen(here, first.plans, self.plans),
            _chosen(here, first.gates, self.gates),
            origin,
        )

    def take(self, kept: Sequence[int]) -> "Pool":
        """The tokens at these places, which ascend."""
        if len(kept) == len(self):
            return self
        index = torch.tensor(kept, dtype=torch.long).to(self.rows.hidden.device)
        begins = [0, *accumulate(self.counts)]
        cuts = [bisect_left(kept, begin) for begin in begins]
        parts = [
            None if end - start == count else index[start:end] - begin
            for (start, end), begin, count in zip(pairwise(cuts), begins, self.counts, strict=False)
        ]
        return Pool(
            self.rows.take(index),
            tuple(end - start for start, end in pairwise(cuts)),
            _taken(self.plans, parts),
            _taken(self.gates, parts),
            None if self.origin is None else self.origin.index_select(0, index),
        )

    def without(self, slot: int) -> "Pool":
        """The tokens of all other sequences."""
        return self.take([i for i, own in enumerate(self.rows.slots.tolist()) if own != slot])

    def advanced(self, hidden: Float[Tensor, "t h"], entries: Int[Tensor, " t"]) -> "Pool":
        """The tokens after a step, with new states, and what the cache policy noted."""
        rows = self.rows
        notes = torch.stack([rows.slots, rows.steps + 1, rows.positions, rows.places, entries])
        return replace(
            self,
            rows=Rows(hidden, notes),
            counts=(0, *self.counts[:-1]),
            plans=(None, *self.plans[:-1]),
            gates=(None,) * len(self.gates),
        )


_PerStep = tuple[Tensor | None, ...]


def _chosen(is_first: Sequence[bool], first: _PerStep, second: _PerStep) -> _PerStep:
    choices = zip(is_first, first, second, strict=True)
    return tuple(a if takes_first else b for takes_first, a, b in choices)


def _taken(values: _PerStep, parts: Sequence[Tensor | None]) -> _PerStep:
    return tuple(
        value if value is None or part is None else value.index_select(0, part)
        for value, part in zip(values, parts, strict=True)
    )
