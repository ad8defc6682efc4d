"""Keys and values kept while generating: what each policy stores, and which rows a step sees.

`kv_memory` has the memory, and gives its rows to lists, a page at a time. A `CachePolicy` says which
lists a sequence has and which rows a token sees at a step:

| policy                | rows stored per layer                      | a token at step r sees           |
|-----------------------|--------------------------------------------|----------------------------------|
| `recursion_wise`      | one for each step that a token runs        | rows of step r                   |
| `recursive_sharing`   | one for each token that runs step 1        | rows of step 1                   |
| `sharing_with_update` | one for each step that a token runs        | rows of step 1, replaced by those|
|                       |                                            | of step r where a token ran r    |
| `exit_state`          | one for each step that a token runs, and   | rows of step r, and of tokens    |
|                       | one when it exits before the last step     | that exited before r             |

Legend: `t` tokens in flight, from any sequence and at any step, `g` key-value heads, `d` head size,
`m` places of a table. A slot is what one running sequence occupies.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from mor_layers.generation.cache.memory import PagedRows
from mor_layers.recursion import KVPolicy


@dataclass(frozen=True)
class TokensInFlight:
    """Tokens about to run the block together. Those of a slot stand together, in order."""

    slots: Int[Tensor, " t"]
    steps: Int[Tensor, " t"]
    """0-based step that each is about to run, ascending; of exited tokens, how many they ran."""
    positions: Int[Tensor, " t"]
    entries: Int[Tensor, " t"]
    """What `CachePolicy.enter` returned for them at the step before; anything at the first."""


@dataclass(frozen=True)
class Visible:
    """Which rows each token sees: the first `counts[i]` of `table[lists[i]]`."""

    table: Int[Tensor, "l m"]
    lists: Int[Tensor, " t"]
    counts: Int[Tensor, " t"]


@dataclass(frozen=True)
class Entered:
    """What tokens in flight write and see in the layers of a block."""

    rows: Int[Tensor, " w"]
    """Where the keys and values of the first tokens go, then those of exited ones."""
    entries: Int[Tensor, " t"]
    """To be handed back at the next step."""
    visible: Visible


class CachePolicy(ABC):
    """Which rows the sequences in a number of slots have, and see."""

    keeps_exited: ClassVar[bool] = False
    """Whether the states of tokens that exited before the last step are stored too."""

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
        """Lists that a slot has."""

    @classmethod
    @abstractmethod
    def rows_for(cls, tokens_per_step: tuple[float, ...], length: float) -> tuple[float, ...]:
        """Length of each list when so many of `length` tokens ran each step."""

    @abstractmethod
    def lists_to_grow(
        self, tokens: TokensInFlight, exited: TokensInFlight | None
    ) -> Int[Tensor, " w"]:
        """The list that each new row belongs to."""

    @abstractmethod
    def enter(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> Entered:
        """Make room for what the tokens store at their steps.

        Args:
            tokens: about to run the block.
            exited: exited before the last step; only where `keeps_exited`.
        """

    def pages_needed(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> int:
        """Pages that `enter` would take."""
        return self.pages.pages_needed(self.lists_to_grow(tokens, exited))

    def fits(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> bool:
        """Whether `enter` finds pages enough."""
        return self.pages.fits(self.lists_to_grow(tokens, exited))

    def release(self, slot: int) -> None:
        """Forget the sequence in a slot."""
        first = slot * self.lists_per_slot
        lists = torch.arange(first, first + self.lists_per_slot, device=self.pages.counts.device)
        self.pages.release(lists)

    def lengthen(self, max_length: int) -> None:
        """Allow sequences of `max_length`."""
        self.max_length = max_length
        self.pages.lengthen(max_length)

    def select(self, slots: Int[Tensor, " s"]) -> Int[Tensor, " p"]:
        """Let slot i hold a copy of what slot `slots[i]` held.

        Returns:
            For each page that there is now, the one that the arena must take its rows from.
        """
        per_slot = self.lists_per_slot
        lists = slots[:, None] * per_slot + torch.arange(per_slot, device=slots.device)
        self.num_slots = len(slots)
        pages, owners = self.pages.select(lists.flatten())
        self._move(slots, pages, owners // per_slot)
        return pages

    def rewind(self, depths: Int[Tensor, "s m"]) -> None:
        """Forget tokens at the end of the sequences.

        Args:
            depths: steps that the token at each place ran; 0 where none stays.
        """
        self.pages.truncate(self._rows_of(depths).flatten())

    @abstractmethod
    def _rows_of(self, depths: Int[Tensor, "s m"]) -> Int[Tensor, "s l"]:
        """Length of each list of each slot when these tokens stay."""

    def _move(self, slots: Tensor, pages: Tensor, owners: Tensor) -> None:
        """Follow the rows of `pages`, which now lie in pages 0, 1, ... and belong to `owners`."""
        return


class RecursionWise(CachePolicy):
    """A list for each step."""

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
        places, rows = self.pages.append(lists)
        return Entered(rows, places, Visible(self.pages.row_of, lists, places + 1))

    def _rows_of(self, depths: Tensor) -> Tensor:
        step = torch.arange(self.num_steps, device=depths.device)[:, None]
        return (depths[:, None] > step).sum(dim=-1)  # [s m] -> [s r m] -> [s r]


class RecursiveSharing(CachePolicy):
    """One list, of the tokens that run the first step."""

    @property
    def lists_per_slot(self) -> int:
        return 1

    @classmethod
    def rows_for(cls, tokens_per_step: tuple[float, ...], length: float) -> tuple[float, ...]:
        return tokens_per_step[:1]

    def lists_to_grow(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> Tensor:
        return tokens.slots[: int((tokens.steps == 0).sum())]

    def enter(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> Entered:
        places, rows = self.pages.append(self.lists_to_grow(tokens, exited))
        entries = torch.cat([places, tokens.entries[len(places) :]])
        return Entered(rows, entries, Visible(self.pages.row_of, tokens.slots, entries + 1))

    def _rows_of(self, depths: Tensor) -> Tensor:
        return (depths > 0).sum(dim=-1, keepdim=True)


class _Overlaid(RecursionWise):
    """For each step a table of the rows it sees, which come from several lists."""

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
        """From the given step on, what stands at a place is the given row."""
        shown = self.seen[slots, :, places]  # [t r]
        shown = torch.where(self._step >= steps[:, None], rows[:, None], shown)
        self.seen[slots, :, places] = shown

    def _visible(self, tokens: TokensInFlight, places: Tensor) -> Visible:
        lists = tokens.slots * self.num_steps + tokens.steps
        return Visible(self.seen.flatten(0, 1), lists, places + 1)


class SharingWithUpdate(_Overlaid):
    """Each step sees the first step's rows, except where it has rows of its own."""

    def enter(self, tokens: TokensInFlight, exited: TokensInFlight | None) -> Entered:
        places, rows = self.pages.append(self.lists_to_grow(tokens, exited))
        is_first = tokens.steps == 0
        entries = torch.where(is_first, places, tokens.entries)
        n = int(is_first.sum())
        self._show_from(tokens.slots[:n], tokens.steps[:n], places[:n], rows[:n])
        self.seen[tokens.slots[n:], tokens.steps[n:], entries[n:]] = rows[n:]
        return Entered(rows, entries, self._visible(tokens, entries))


class ExitState(_Overlaid):
    """Each step sees its own rows, and one row for every token that exited before."""

    keeps_exited = True

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
        _, rows = self.pages.append(self.lists_to_grow(tokens, exited))
        own = rows[: len(tokens.slots)]
        self.seen[tokens.slots, tokens.steps, tokens.positions] = own
        if exited is not None:
            self._show_from(exited.slots, exited.steps, exited.positions, rows[len(own) :])
        return Entered(rows, tokens.entries, self._visible(tokens, tokens.positions))

    def _rows_of(self, depths: Tensor) -> Tensor:
        # Rows of exited tokens are in the order in which they exited, not in that of the text:
        # they stay, unseen, until the sequence ends.
        exited = self.pages.counts.view(-1, self.lists_per_slot)[:, -1:]
        return torch.cat([super()._rows_of(depths), exited], dim=1)


CACHE_POLICIES: dict[KVPolicy, type[CachePolicy]] = {
    "recursion_wise": RecursionWise,
    "recursive_sharing": RecursiveSharing,
    "sharing_with_update": SharingWithUpdate,
    "exit_state": ExitState,
}
