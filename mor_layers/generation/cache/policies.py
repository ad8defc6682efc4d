"""The cache in generation: what each KV policy stores, and which rows a step sees.

The module `memory` holds the rows and allocates them to lists, one page at a time. A `CachePolicy`
determines which lists a sequence has and which rows a token sees at a step:

| policy                | rows stored per layer                      | a token at step r sees           |
|-----------------------|--------------------------------------------|----------------------------------|
| `recursion_wise`      | one for each step that a token runs        | rows of step r                   |
| `recursive_sharing`   | one for each token that runs step 1        | rows of step 1                   |
| `sharing_with_update` | one for each step that a token runs        | rows of step 1, replaced by those|
|                       |                                            | of step r where a token ran r    |
| `exit_state`          | one for each step that a token runs, and   | rows of step r, and of tokens    |
|                       | one when it exits before the last step     | that exited before r             |

Legend: `t` tokens in flight, from any sequence and at any step, `g` key-value heads, `d` head size,
`m` entries of a table. Each running sequence occupies one slot.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from mor_layers.generation.cache.memory import PagedRows
from mor_layers.recursion import KVPolicy


@dataclass(frozen=True)
class TokensInFlight:
    """Tokens that are about to run the block together. Those of a slot are adjacent and in order."""

    slots: Int[Tensor, " t"]
    steps: Int[Tensor, " t"]
    """0-based step that each token is about to run, ascending; for exited tokens, the steps they ran."""
    positions: Int[Tensor, " t"]
    entries: Int[Tensor, " t"]
    """What `CachePolicy.enter` returned for them at the previous step; unspecified at step 0."""
    are_alone: bool = False
    """Whether it is known that no slot has more than one of them."""
    is_running: Bool[Tensor, " t"] | None = None
    """Inside a graph: which rows hold a token; the slot of the others is the last one, which is spare.
    None: all of them, outside of graphs."""
    num_first: int | None = None
    """Inside a graph: the tokens that run step 0 are among so many first ones. None: find out."""

    def count_first(self) -> int:
        """How many of the first tokens may run step 0."""
        return int((self.steps == 0).sum()) if self.num_first is None else self.num_first


@dataclass(frozen=True)
class Visible:
    """The rows that each token sees: the first `counts[i]` of `table[lists[i]]`."""

    table: Int[Tensor, "l m"]
    lists: Int[Tensor, " t"]
    counts: Int[Tensor, " t"]


@dataclass(frozen=True)
class Entered:
    """The rows that tokens in flight write and see in the layers of a block."""

    rows: Int[Tensor, " w"]
    """Rows for the keys and values of the first tokens, then for those of exited tokens."""
    entries: Int[Tensor, " t"]
    """To be passed back at the next step."""
    visible: Visible


class CachePolicy(ABC):
    """The rows that the sequences in a number of slots have and see."""

    keeps_exited: ClassVar[bool] = False
    """Whether states of tokens that exited before the last step are stored too."""
    projects_alike: ClassVar[bool] = True
    """Whether queries, keys and values are computed for the same tokens."""

    def __init__(
        self,
        num_slots: int,
        num_steps: int,
        num_pages: int,
        page_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_slots, self.num_steps, self.max_length = num_slots, num_steps, max_length
        num_lists = num_slots * self.lists_per_slot
        self.pages = PagedRows(num_pages, page_size, num_lists, max_length, device)

    @property
    @abstractmethod
    def lists_per_slot(self) -> int:
        """Number of lists of a slot."""

    @classmethod
    @abstractmethod
    def rows_for(cls, tokens_per_step: tuple[float, ...], length: float) -> tuple[float, ...]:
        """Length of each list if `tokens_per_step` of `length` tokens ran each step."""

    @abstractmethod
    def lists_to_grow(
        self, tokens: TokensInFlight, exited: TokensInFlight | None
    ) -> Int[Tensor, " w"]:
        """The list that each new row belongs to."""

    @abstractmethod
    def enter(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> Entered:
        """Make room for what the tokens store at their steps.

        Args:
            tokens: tokens that are about to run the block.
            exited: tokens that exited before the last step; only if `keeps_exited`.
        """

    def append(
        self, tokens: TokensInFlight, exited: TokensInFlight | None
    ) -> tuple[Int[Tensor, " w"], Int[Tensor, " w"]]:
        """New entries in `lists_to_grow`: their indices in these lists, and their rows."""
        lists = self.lists_to_grow(tokens, exited)
        if tokens.is_running is None:
            # Several tokens of a slot may have exited since their rows were stored last.
            return self.pages.append(lists, tokens.are_alone and exited is None)
        is_new = tokens.is_running
        if exited is not None and exited.is_running is not None:
            is_new = torch.cat([is_new, exited.is_running])
        return self.pages.append_in_graph(lists, is_new[: len(lists)])

    def pages_needed(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> int:
        """Number of pages that `enter` would need."""
        return self.pages.pages_needed(self.lists_to_grow(tokens, exited))

    def fits(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> bool:
        """Whether there are enough pages for `enter`."""
        most = len(tokens.slots) + (0 if exited is None else len(exited.slots))
        if self.pages.has_free(most):
            return True
        return self.pages.fits(self.lists_to_grow(tokens, exited))

    def release(self, slot: int) -> None:
        """Remove the sequence in a slot."""
        first = slot * self.lists_per_slot
        lists = torch.arange(first, first + self.lists_per_slot, device=self.pages.counts.device)
        self.pages.release(lists)

    @abstractmethod
    def tables(self, slot: int) -> Int[Tensor, "v m"]:
        """The rows that a sequence sees: a table for all steps or one for each. May be written to."""

    @abstractmethod
    def num_entries(self, depths: Sequence[int]) -> tuple[int, ...]:
        """Number of entries of each table for tokens that ran so many steps each."""

    @abstractmethod
    def borrow(self, slot: int, lengths: Sequence[int]) -> None:
        """Let a sequence without rows of its own begin with the rows of others.

        Args:
            lengths: number of entries of each table, which already name those rows.
        """

    def lengthen(self, max_length: int) -> None:
        """Allow sequences of up to `max_length` tokens."""
        self.max_length = max_length
        self.pages.lengthen(max_length)

    def select(self, slots: Int[Tensor, " s"]) -> Int[Tensor, " p"]:
        """Replace the contents of each slot i by a copy of slot `slots[i]`.

        Returns:
            For each new page, the old page from which the arena must copy its rows.
        """
        per_slot = self.lists_per_slot
        lists = slots[:, None] * per_slot + torch.arange(per_slot, device=slots.device)
        self.num_slots = len(slots)
        pages, owners = self.pages.select(lists.flatten())
        self._move(slots, pages, owners // per_slot)
        return pages

    def rewind(self, depths: Int[Tensor, "s m"]) -> None:
        """Remove tokens at the end of the sequences.

        Args:
            depths: number of steps that each remaining token ran; 0 for removed tokens.
        """
        self.pages.truncate(self._rows_of(depths).flatten())

    @abstractmethod
    def _rows_of(self, depths: Int[Tensor, "s m"]) -> Int[Tensor, "s l"]:
        """Length of each list of each slot if these tokens remain."""

    def _move(self, slots: Tensor, pages: Tensor, owners: Tensor) -> None:
        """Update references to the rows of `pages`, which are now pages 0, 1, ... of `owners`."""
        return


class RecursionWise(CachePolicy):
    """One list per step."""

    @property
    def lists_per_slot(self) -> int:
        return self.num_steps

    @classmethod
    def rows_for(cls, tokens_per_step: tuple[float, ...], length: float) -> tuple[float, ...]:
        return tokens_per_step

    def lists_to_grow(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> Tensor:
        return tokens.slots * self.num_steps + tokens.steps

    def enter(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> Entered:
        lists = self.lists_to_grow(tokens, exited)
        places, rows = self.append(tokens, exited)
        return Entered(rows, places, Visible(self.pages.row_of, lists, places + 1))

    def tables(self, slot: int) -> Tensor:
        return self.pages.row_of[slot * self.num_steps : (slot + 1) * self.num_steps]

    def num_entries(self, depths: Sequence[int]) -> tuple[int, ...]:
        return tuple(sum(depth > step for depth in depths) for step in range(self.num_steps))

    def borrow(self, slot: int, lengths: Sequence[int]) -> None:
        counts = torch.tensor(lengths, device=self.pages.counts.device)
        first = slot * self.num_steps
        lists = torch.arange(first, first + self.num_steps, device=counts.device)
        self.pages.borrow(lists, counts)

    def _rows_of(self, depths: Tensor) -> Tensor:
        step = torch.arange(self.num_steps, device=depths.device)[:, None]
        return (depths[:, None] > step).sum(dim=-1)  # [s m] -> [s r m] -> [s r]


class RecursiveSharing(CachePolicy):
    """One list, with the tokens that run the first step."""

    projects_alike = False

    @property
    def lists_per_slot(self) -> int:
        return 1

    @classmethod
    def rows_for(cls, tokens_per_step: tuple[float, ...], length: float) -> tuple[float, ...]:
        return tokens_per_step[:1]

    def lists_to_grow(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> Tensor:
        return tokens.slots[: tokens.count_first()]

    def enter(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> Entered:
        places, rows = self.append(tokens, exited)
        entries = torch.cat([places, tokens.entries[len(places) :]])
        return Entered(rows, entries, Visible(self.pages.row_of, tokens.slots, entries + 1))

    def tables(self, slot: int) -> Tensor:
        return self.pages.row_of[slot : slot + 1]

    def num_entries(self, depths: Sequence[int]) -> tuple[int, ...]:
        return (sum(depth > 0 for depth in depths),)

    def borrow(self, slot: int, lengths: Sequence[int]) -> None:
        device = self.pages.counts.device
        self.pages.borrow(torch.tensor([slot], device=device), torch.tensor(lengths, device=device))

    def _rows_of(self, depths: Tensor) -> Tensor:
        return (depths > 0).sum(dim=-1, keepdim=True)


class _Overlaid(RecursionWise):
    """A table per step of the rows that it sees, which come from several lists."""

    def __init__(
        self,
        num_slots: int,
        num_steps: int,
        num_pages: int,
        page_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_slots, num_steps, num_pages, page_size, max_length, device)
        size = (num_slots, num_steps, max_length)
        self.seen = torch.zeros(size, dtype=torch.long, device=device)
        self._step = torch.arange(num_steps, device=device)

    def tables(self, slot: int) -> Tensor:
        return self.seen[slot]

    def lengthen(self, max_length: int) -> None:
        super().lengthen(max_length)
        self.seen = F.pad(self.seen, (0, max(0, max_length - self.seen.shape[2])))

    def _move(self, slots: Tensor, pages: Tensor, owners: Tensor) -> None:
        size, seen = self.pages.page_size, self.seen[slots]
        num_before = 1 + max(int(self.seen.max()) // size, *pages.tolist(), 0)
        moved = seen.new_zeros(len(slots), num_before)
        moved[owners, pages] = torch.arange(len(pages), device=pages.device)
        page = moved.gather(1, (seen // size).flatten(1)).view_as(seen)
        self.seen = page * size + seen % size

    def _show_from(self, slots: Tensor, steps: Tensor, places: Tensor, rows: Tensor) -> None:
        """Let all steps from the given one on see the given row at a place."""
        shown = self.seen[slots, :, places]  # [t r]
        shown = torch.where(self._step >= steps[:, None], rows[:, None], shown)
        self.seen[slots, :, places] = shown

    def _visible(self, tokens: TokensInFlight, places: Tensor) -> Visible:
        lists = tokens.slots * self.num_steps + tokens.steps
        return Visible(self.seen.flatten(0, 1), lists, places + 1)


class SharingWithUpdate(_Overlaid):
    """Each step sees the first step's rows, except where it has rows of its own."""

    def enter(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> Entered:
        places, rows = self.append(tokens, exited)
        entries = torch.where(tokens.steps == 0, places, tokens.entries)
        n = tokens.count_first()
        self._show_from(tokens.slots[:n], tokens.steps[:n], places[:n], rows[:n])
        self.seen[tokens.slots[n:], tokens.steps[n:], entries[n:]] = rows[n:]
        return Entered(rows, entries, self._visible(tokens, entries))

    def num_entries(self, depths: Sequence[int]) -> tuple[int, ...]:
        return (sum(depth > 0 for depth in depths),) * self.num_steps

    def borrow(self, slot: int, lengths: Sequence[int]) -> None:
        # Places in the first step's list are places in the tables. The other lists only own rows.
        super().borrow(slot, [lengths[0], *[0] * (self.num_steps - 1)])


class ExitState(_Overlaid):
    """Each step sees its own rows, and one row for every token that exited earlier."""

    keeps_exited = True
    projects_alike = False

    @property
    def lists_per_slot(self) -> int:
        return self.num_steps + 1

    @classmethod
    def rows_for(cls, tokens_per_step: tuple[float, ...], length: float) -> tuple[float, ...]:
        return (*tokens_per_step, length - tokens_per_step[-1])

    def lists_to_grow(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> Tensor:
        lists = tokens.slots * self.lists_per_slot + tokens.steps
        if exited is None:
            return lists
        return torch.cat([lists, exited.slots * self.lists_per_slot + self.num_steps])

    def enter(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> Entered:
        _, rows = self.append(tokens, exited)
        own = rows[: len(tokens.slots)]
        self.seen[tokens.slots, tokens.steps, tokens.positions] = own
        if exited is not None:
            self._show_from(exited.slots, exited.steps, exited.positions, rows[len(own) :])
        return Entered(rows, tokens.entries, self._visible(tokens, tokens.positions))

    def num_entries(self, depths: Sequence[int]) -> tuple[int, ...]:
        return (len(depths),) * self.num_steps

    def borrow(self, slot: int, lengths: Sequence[int]) -> None:
        return  # places in the tables are positions, and the lists only own rows

    def _rows_of(self, depths: Tensor) -> Tensor:
        # Rows of exited tokens are in the order of exit and not in that of the text, so they cannot be
        # cut. They remain, unseen, until the sequence ends.
        exited = self.pages.counts.view(-1, self.lists_per_slot)[:, -1:]
        return torch.cat([super()._rows_of(depths), exited], dim=1)


CACHE_POLICIES: dict[KVPolicy, type[CachePolicy]] = {
    "recursion_wise": RecursionWise,
    "recursive_sharing": RecursiveSharing,
    "sharing_with_update": SharingWithUpdate,
    "exit_state": ExitState,
}
