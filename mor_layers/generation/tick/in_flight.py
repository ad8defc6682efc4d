"""Tokens in flight through a generating model, and the data that accompanies them.

Legend: `t` tokens in flight, `h` hidden, `p` numbers per token in a router's plan.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Some tokens: their states, and five integers for each."""

    hidden: Float[Tensor, "t h"]
    notes: Int[Tensor, "5 t"]
    """The values of the five properties below, in one tensor, so that `take` is one operation."""

    @classmethod
    def of(
        cls, hidden: Tensor, slots: Tensor, steps: Tensor, positions: Tensor, places: Tensor
    ) -> "Rows":
        """Tokens for which the cache policy has no entries yet."""
        return cls(hidden, torch.stack([slots, steps, positions, places, torch.zeros_like(slots)]))

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """The tokens of all parts, concatenated."""
        if len(parts) == 1:
            return parts[0]
        notes = torch.cat([part.notes for part in parts], dim=1)
        return cls(torch.cat([part.hidden for part in parts]), notes)

    def __len__(self) -> int:
        return len(self.hidden)

    @cached_property
    def slots(self) -> Int[Tensor, " t"]:
        """The sequence that each token belongs to."""
        return self.notes[0]

    @cached_property
    def steps(self) -> Int[Tensor, " t"]:
        """Number of steps that each token has run, which is the 0-based number of its next step."""
        return self.notes[1]

    @cached_property
    def positions(self) -> Int[Tensor, " t"]:
        """Position of each token in its text."""
        return self.notes[2]

    @cached_property
    def batch_of_positions(self) -> Int[Tensor, "1 t"]:
        """The positions, as a batch of `t` sequences of one token."""
        return self.positions[None]

    @cached_property
    def places(self) -> Int[Tensor, " t"]:
        """Position of each token in its span."""
        return self.notes[3]

    @cached_property
    def entries(self) -> Int[Tensor, " t"]:
        """The entries that the cache policy returned, to be passed to it at the next step."""
        return self.notes[4]

    def take(self, index: Int[Tensor, " k"]) -> "Rows":
        """Some of the tokens."""
        return Rows(self.hidden.index_select(0, index), self.notes.index_select(1, index))

    def without(self, slot: int) -> "Rows":
        """The tokens of all other sequences."""
        return self.take((self.slots != slot).nonzero()[:, 0])


@dataclass(frozen=True)
class Pool:
    """Tokens that run the recursion, ordered and grouped by step.

    Whatever is done to all tokens is one operation, regardless of their steps. Only routers are called
    once per step, because their plans may have a different size at each step.
    """

    rows: Rows
    counts: tuple[int, ...]
    """Number of tokens at each step; the last entry counts those that have run all steps."""
    plans: tuple[Float[Tensor, "t p"] | None, ...]
    """The router's plan for the tokens of each step; None if there is none."""
    gates: tuple[Float[Tensor, " t"] | None, ...]
    """Factors of the block's output for the tokens of each step; None if there are none."""
    origin: Float[Tensor, "t h"] | None = None
    """States that entered the recursion, if the router needs them."""

    @classmethod
    def at(cls, step: int, num_steps: int, rows: Rows, origin: Tensor | None = None) -> "Pool":
        """Tokens that have all run `step` of `num_steps` steps."""
        counts, nothing = [0] * (num_steps + 1), (None,) * (num_steps + 1)
        counts[step] = len(rows)
        return cls(rows, tuple(counts), nothing, nothing, origin)

    @classmethod
    def joined(cls, step: int, pools: Sequence["Pool"]) -> "Pool":
        """The tokens of all pools, ordered by slot. They are at `step`, and at least one pool has some.

        Args:
            pools: of the tokens of a slot, earlier pools have earlier ones.
        """
        pools = [pool for pool in pools if len(pool)]
        rows = Rows.joined([pool.rows for pool in pools])
        order = rows.slots.sort(stable=True).indices
        joined = cls.at(step, len(pools[0].counts) - 1, rows.take(order), None)
        plans, origins = [pool.plans[step] for pool in pools], [pool.origin for pool in pools]
        plan = _joined(plans, order)
        plans = tuple(plan if own == step else None for own in range(len(joined.plans)))
        return replace(joined, plans=plans, origin=_joined(origins, order))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def step(self) -> int:
        """The step that all tokens are at; that of the first ones, if there are several."""
        return next((step for step, _ in self.parts()), 0)

    def origin_of(self, own: slice) -> Float[Tensor, "k h"] | None:
        """States that entered the recursion, for the tokens of a slice."""
        return None if self.origin is None else self.origin[own]

    def parts(self) -> Iterator[tuple[int, slice]]:
        """Each step that has tokens, with their slice."""
        ends = accumulate(self.counts)
        for step, (end, count) in enumerate(zip(ends, self.counts, strict=True)):
            if count:
                yield step, slice(end - count, end)

    def behind(self, first: "Pool") -> "Pool":
        """The tokens of both pools; those of `first` are at earlier steps."""
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
        """The tokens at the given indices, which are ascending."""
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
        """The tokens after a step, with new states and the cache policy's new entries."""
        notes = self.rows.notes.clone()
        notes[1] += 1  # steps
        notes[4] = entries
        return replace(
            self,
            rows=Rows(hidden, notes),
            counts=(0, *self.counts[:-1]),
            plans=(None, *self.plans[:-1]),
            gates=(None,) * len(self.gates),
        )


_PerStep = tuple[Tensor | None, ...]


def _joined(parts: Sequence[Tensor | None], order: Tensor) -> Tensor | None:
    """All parts in one tensor, in the given order; None if they are None."""
    known = [part for part in parts if part is not None]
    return torch.cat(known).index_select(0, order) if known else None


def _chosen(is_first: Sequence[bool], first: _PerStep, second: _PerStep) -> _PerStep:
    choices = zip(is_first, first, second, strict=True)
    return tuple(a if takes_first else b for takes_first, a, b in choices)


def _taken(values: _PerStep, parts: Sequence[Tensor | None]) -> _PerStep:
    return tuple(
        value if value is None or part is None else value.index_select(0, part)
        for value, part in zip(values, parts, strict=True)
    )
