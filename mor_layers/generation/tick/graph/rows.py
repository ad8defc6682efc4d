"""StaticRows: tokens in flight in tensors whose shapes say nothing about them.

Which rows hold a token, and at which step it is, are values. `Pool` holds the same tokens in groups by
step, whose sizes the host knows.

Legend: `t` rows, `w` numbers that a token carries between steps, `p` numbers of a router's plan.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor_layers.generation.tick.in_flight import Pool, Rows

if TYPE_CHECKING:
    from mor_layers.generation.tick.graph.routing import StaticRouting


@dataclass(frozen=True)
class StaticRows:
    """Rows that may hold tokens. Those of a sequence are adjacent, and in order."""

    hidden: Float[Tensor, "t w"]
    notes: Int[Tensor, "5 t"]
    """As in `Rows`. A row that holds no token is in the spare slot, at step 0."""
    is_running: Bool[Tensor, " t"]
    """Which rows hold a token that runs its next step."""
    plan: Float[Tensor, "t p"]
    """The router's plan; at a step that has a shorter one, in the first columns."""
    gates: Float[Tensor, " t"]
    """Factors of the block's output, where the router has some."""
    origin: Float[Tensor, "t w"]
    """States that entered the recursion; without columns if nobody needs them."""

    @property
    def slots(self) -> Int[Tensor, " t"]:
        return self.notes[0]

    @property
    def steps(self) -> Int[Tensor, " t"]:
        return self.notes[1]

    @property
    def positions(self) -> Int[Tensor, " t"]:
        return self.notes[2]

    @property
    def places(self) -> Int[Tensor, " t"]:
        return self.notes[3]

    @property
    def entries(self) -> Int[Tensor, " t"]:
        return self.notes[4]

    @property
    def origin_or_none(self) -> Float[Tensor, "t w"] | None:
        return self.origin if self.origin.shape[1] else None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the constructor's arguments."""
        return self.hidden, self.notes, self.is_running, self.plan, self.gates, self.origin

    def packed(self, size: int, nowhere: Int[Tensor, "5 1"]) -> "StaticRows":
        """The rows that run, in order, in so many rows, of which there must be enough.

        Args:
            nowhere: the notes of rows that hold no token.
        """
        index, is_taken = first_where(self.is_running, size)
        taken = StaticRows(*(t[index] for t in (self.hidden, self.notes.T, *self.tensors[2:])))
        notes = torch.where(is_taken, taken.notes.T, nowhere)
        return replace(taken, notes=notes, is_running=is_taken)

    def behind(self, first: "StaticRows") -> "StaticRows":
        """The rows of both."""
        hidden, notes, *rest = zip(first.tensors, self.tensors, strict=True)
        return StaticRows(torch.cat(hidden), torch.cat(notes, dim=1), *map(torch.cat, rest))

    def padded(self, missing: int, nowhere: Int[Tensor, "5 1"]) -> "StaticRows":
        """These rows, and some that hold no token."""
        hidden, notes, *rest = self.tensors
        more = [_lengthened(values, missing) for values in rest]
        notes = torch.cat([notes, nowhere.repeat(1, missing)], dim=1)
        return StaticRows(_lengthened(hidden, missing), notes, *more)

    def without(self, slot: int) -> "StaticRows":
        """The rows, of which those of a sequence hold no token any longer."""
        return replace(self, is_running=self.is_running & (self.slots != slot))

    def to_pool(self, routing: "StaticRouting") -> Pool:
        """The running tokens, grouped by step."""
        index = self.is_running.nonzero()[:, 0]
        index = index[self.steps[index].sort(stable=True).indices]
        rows = Rows(self.hidden[index], self.notes[:, index])
        counts = torch.bincount(rows.steps, minlength=routing.num_steps + 1).tolist()
        plans = [
            own[:, :size] if size else None
            for own, size in zip(
                self.plan[index].split(counts), [*routing.plan_sizes, 0], strict=True
            )
        ]
        gates = [
            own if has else None
            for own, has in zip(
                self.gates[index].split(counts), [*routing.has_gates, False], strict=True
            )
        ]
        origin = self.origin_or_none
        return Pool(
            rows,
            tuple(counts),
            tuple(plans),
            tuple(gates),
            None if origin is None else origin[index],
        )

    @classmethod
    def from_pool(cls, pool: Pool, routing: "StaticRouting") -> "StaticRows":
        """Tokens that have been routed to their next step."""
        if not len(pool):
            return cls.none(routing)
        plans, gates = [], []
        for step, own in pool.parts():
            plan, gate, count = pool.plans[step], pool.gates[step], own.stop - own.start
            ones = torch.ones(count, 1, device=routing.states.device)
            plans.append(routing.widened(ones[:, :0] if plan is None else plan))
            gates.append((ones[:, 0] if gate is None else gate).to(routing.gate_dtype))
        rows, origin = pool.rows, pool.origin
        return cls(
            rows.hidden,
            rows.notes,
            torch.ones_like(rows.slots, dtype=torch.bool),
            torch.cat(plans),
            torch.cat(gates),
            rows.hidden[:, :0] if origin is None else origin,
        )

    @classmethod
    def none(cls, routing: "StaticRouting") -> "StaticRows":
        """No rows."""
        states = routing.states[:0].clone()
        notes = torch.zeros(5, 0, dtype=torch.long, device=states.device)
        return cls(
            states,
            notes,
            notes[0].bool(),
            states.new_zeros(0, routing.widest, dtype=routing.plan_dtype),
            states.new_zeros(0, dtype=routing.gate_dtype),
            states if routing.block.needs_origin else states[:, :0],
        )


def first_where(
    is_wanted: Bool[Tensor, " t"], size: int
) -> tuple[Int[Tensor, " k"], Bool[Tensor, " k"]]:
    """The indices of the first wanted rows, in `size` entries, and which entries have one.

    Entries that have none hold index 0.
    """
    place = is_wanted.long().cumsum(0) - 1
    place = torch.where(is_wanted & (place < size), place, size)
    row = torch.arange(len(is_wanted), device=is_wanted.device)
    index = row.new_zeros(size + 1).scatter(0, place, row)[:size]
    count = is_wanted.sum()
    return index, torch.arange(size, device=row.device) < count


def _lengthened(values: Tensor, missing: int) -> Tensor:
    """`[k ...]` with further rows of zeros."""
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
