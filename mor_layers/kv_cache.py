"""Keys and values kept while generating: what each policy stores, and which rows a step sees.

Three parts, each of which can be read alone. `KVArena` is memory: rows of keys and values, allocated
once. `PagedRows` is bookkeeping: it gives rows to lists, a page at a time, and takes them back. A
`CachePolicy` says which lists a sequence has and which rows a token sees at a step:

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
from jaxtyping import Float, Int
from torch import Tensor

from mor_layers.attention import KVPolicy


class KVArena:
    """Memory for keys and values of several layers, allocated once.

    Args:
        num_layers: layers whose rows grow together: a row number means the same token in each.
        num_rows: rows in each layer.
        num_heads: key-value heads.
        is_int8: store 8-bit integers and one scale (fp32) per head of each key and value.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_heads: int,
        head_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        is_int8: bool = False,
    ) -> None:
        self.dtype = dtype
        shape = (num_layers, num_rows, 2, num_heads, head_size)
        self.data = torch.zeros(shape, dtype=torch.int8 if is_int8 else dtype, device=device)
        self.scales = torch.zeros(shape[:-1], device=device) if is_int8 else None

    @staticmethod
    def bytes_per_row(
        num_layers: int, num_heads: int, head_size: int, dtype: torch.dtype, is_int8: bool
    ) -> int:
        """Bytes that a row takes in all layers together."""
        head = head_size + 4 if is_int8 else head_size * dtype.itemsize
        return num_layers * 2 * num_heads * head

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def write(
        self,
        layer: int,
        rows: Int[Tensor, " t"],
        key: Float[Tensor, "t g d"],
        value: Float[Tensor, "t g d"],
    ) -> None:
        """Fill rows of a layer."""
        for part, heads in enumerate((key, value)):
            if self.scales is not None:
                scale = heads.float().abs().amax(dim=-1).clamp(min=1e-30) / 127.0
                self.scales[layer, :, part].index_copy_(0, rows, scale)
                heads = (heads.float() / scale[..., None]).round().to(torch.int8)
            self.data[layer, :, part].index_copy_(0, rows, heads)

    def vectors(self, layer: int) -> Float[Tensor, "v d"]:
        """All keys and values of a layer without a copy, key heads before value heads in a row."""
        assert self.scales is None, "8-bit rows must be gathered"
        return self.data[layer].flatten(0, 2)

    def gather(self, layer: int, rows: Int[Tensor, " t"]) -> Float[Tensor, "t 2 g d"]:
        """A copy of some rows, as floating point."""
        data = self.data[layer].index_select(0, rows)
        if self.scales is None:
            return data
        return (data * self.scales[layer].index_select(0, rows)[..., None]).to(self.dtype)


class PagedRows:
    """Hands out an arena's rows to lists that grow at their end, one page at a time.

    Args:
        num_pages: pages there are.
        page_size: rows in a page.
        num_lists: lists there may be; they are numbered.
        max_rows: rows in the longest list.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_lists: int,
        max_rows: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        pages_per_list = -(-max_rows // page_size)
        self.row_of = torch.zeros(
            num_lists, pages_per_list * page_size, dtype=torch.long, device=device
        )
        """Row of each entry of each list."""
        self.counts = torch.zeros(num_lists, dtype=torch.long, device=device)
        self._free = list(range(num_pages))[::-1]
        self._in_page = torch.arange(page_size, device=device)

    @property
    def pages_in_use(self) -> int:
        return self.num_pages - len(self._free)

    @property
    def pages_free(self) -> int:
        return len(self._free)

    def pages_for(self, count: int) -> int:
        """Pages of a list of `count` rows."""
        return -(-count // self.page_size)

    def pages_needed(self, lists: Int[Tensor, " t"]) -> int:
        """Further pages that `append` to these lists would take."""
        added = torch.bincount(lists, minlength=len(self.counts))
        before = self._pages(self.counts)
        return int((self._pages(self.counts + added) - before).sum())

    def append(self, lists: Int[Tensor, " t"]) -> tuple[Int[Tensor, " t"], Int[Tensor, " t"]]:
        """Lengthen lists by one entry for each time they are named.

        Returns:
            The new entries' places in their lists, and their rows.
        """
        if not len(lists):
            return lists, lists
        ordered, order = lists.sort(stable=True)
        begins = torch.searchsorted(ordered, ordered)
        rank = torch.empty_like(lists)
        rank[order] = torch.arange(len(lists), device=lists.device) - begins
        places = self.counts[lists] + rank
        self.counts.index_add_(0, lists, torch.ones_like(lists))
        opens_page = places % self.page_size == 0
        opening = lists[opens_page]
        if len(opening):
            assert len(opening) <= len(self._free), "ask pages_needed first"
            pages = torch.tensor(
                [self._free.pop() for _ in range(len(opening))], device=lists.device
            )
            columns = places[opens_page][:, None] + self._in_page
            rows = pages[:, None] * self.page_size + self._in_page
            self.row_of[opening[:, None], columns] = rows
        return places, self.row_of[lists, places]

    def release(self, lists: Int[Tensor, " l"]) -> None:
        """Empty some lists; their pages are free again."""
        counts = self._pages(self.counts[lists])
        first_rows = self.row_of[lists, :: self.page_size]
        is_used = torch.arange(first_rows.shape[1], device=lists.device) < counts[:, None]
        self._free.extend((first_rows[is_used] // self.page_size).tolist())
        self.counts[lists] = 0

    def _pages(self, counts: Tensor) -> Tensor:
        return (counts + self.page_size - 1) // self.page_size


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

    def release(self, slot: int) -> None:
        """Forget the sequence in a slot."""
        first = slot * self.lists_per_slot
        lists = torch.arange(first, first + self.lists_per_slot, device=self.pages.counts.device)
        self.pages.release(lists)


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


CACHE_POLICIES: dict[KVPolicy, type[CachePolicy]] = {
    "recursion_wise": RecursionWise,
    "recursive_sharing": RecursiveSharing,
    "sharing_with_update": SharingWithUpdate,
    "exit_state": ExitState,
}
