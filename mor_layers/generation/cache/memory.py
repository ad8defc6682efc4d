"""Memory for keys and values in generation: `KVArena` stores rows, `PagedRows` allocates them.

Legend: `t` tokens, `l` lists, `g` key-value heads, `d` head size,
`p` vectors of a head in a row (a key and a value, or a latent row).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

EightBits = Literal["int8", "fp8"]
"""Formats of rows whose numbers have 8 bits: integers, which are evenly spaced, or floating point
(E4M3), which is finer near 0."""
_LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The largest number of each."""


class KVArena:
    """Memory for keys and values of several layers, allocated once.

    Args:
        num_layers: number of layers that grow together; a row number means the same token in each.
        num_rows: number of rows in each layer.
        num_heads: key-value heads, or 1 where rows are latent.
        num_vectors: vectors of each head: a key and a value, or 1 where one vector is both, as a latent
            row.
        eight_bits: store numbers of 8 bits and one scale (fp32) per head of each key and value.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_heads: int,
        head_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        eight_bits: EightBits | None = None,
        num_vectors: int = 2,
    ) -> None:
        self.dtype, self.eight_bits = dtype, eight_bits
        shape = (num_layers, num_rows, num_vectors, num_heads, head_size)
        # The bits of fp8 are kept as integers, because few operations take it.
        self.data = torch.zeros(shape, dtype=torch.int8 if eight_bits else dtype, device=device)
        self.scales = torch.zeros(shape[:-1], device=device) if eight_bits else None

    @staticmethod
    def bytes_per_row(
        num_layers: int,
        num_heads: int,
        head_size: int,
        dtype: torch.dtype,
        eight_bits: EightBits | None = None,
        num_vectors: int = 2,
    ) -> int:
        """Bytes that a row needs in all layers together."""
        head = head_size + 4 if eight_bits else head_size * dtype.itemsize
        return num_layers * num_vectors * num_heads * head

    @property
    def num_vectors(self) -> int:
        """Vectors of each head in a row."""
        return self.data.shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def grow(self, num_rows: int) -> None:
        """Add rows to every layer; the existing rows are copied once."""
        self.data = F.pad(self.data, (0, 0) * 3 + (0, num_rows))
        if self.scales is not None:
            self.scales = F.pad(self.scales, (0, 0) * 2 + (0, num_rows))

    def take_pages(self, pages: Int[Tensor, " p"], page_size: int) -> None:
        """Replace the contents by copies of these pages, in this order."""
        in_page = torch.arange(page_size, device=pages.device)
        rows = (pages[:, None] * page_size + in_page).flatten()
        self.data = self.data.index_select(1, rows)
        if self.scales is not None:
            self.scales = self.scales.index_select(1, rows)

    def write(
        self,
        layer: int,
        rows: Int[Tensor, " t"],
        key: Float[Tensor, "t g d"],
        value: Float[Tensor, "t g d"] | None,
    ) -> None:
        """Fill rows of a layer; `value` is None where a row has one vector."""
        assert (value is None) == (self.num_vectors == 1)
        new = key[:, None] if value is None else torch.stack([key, value], dim=1)  # [t p g d]
        if self.scales is not None:
            new, scale = self.quantized(new)
            self.scales[layer].index_copy_(0, rows, scale)
        self.data[layer].index_copy_(0, rows, new)

    def layer(self, layer: int) -> tuple[Tensor, Float[Tensor, "r p g"] | None]:
        """What a layer stores, `[r p g d]` in the format of the arena, and the scales of 8-bit rows."""
        data = self.data[layer]
        if self.eight_bits == "fp8":
            data = data.view(torch.float8_e4m3fn)
        return data, None if self.scales is None else self.scales[layer]

    def vectors(self, layer: int) -> Float[Tensor, "v d"]:
        """All keys and values of a layer, not copied; in a row, key heads precede value heads."""
        assert self.scales is None, "8-bit rows must be expanded"
        return self.data[layer].flatten(0, 2)

    def gather(self, layer: int, rows: Int[Tensor, " t"]) -> Float[Tensor, "t p g d"]:
        """A copy of some rows, in floating point."""
        data = self.data[layer].index_select(0, rows)
        if self.scales is None:
            return data
        return self.dequantized(data, self.scales[layer].index_select(0, rows)).to(self.dtype)

    def quantized(
        self, vectors: Float[Tensor, "t p g d"]
    ) -> tuple[Int[Tensor, "t p g d"], Float[Tensor, "t p g"]]:
        """What is stored of vectors: 8 bits of each number, and the scale of each head."""
        assert self.eight_bits is not None
        vectors = vectors.float()
        scales = vectors.abs().amax(dim=-1).clamp(min=1e-30) / _LARGEST[self.eight_bits]
        scaled = vectors / scales[..., None]
        if self.eight_bits == "fp8":
            return scaled.to(torch.float8_e4m3fn).view(torch.int8), scales
        return scaled.round().to(torch.int8), scales

    def dequantized(
        self,
        bits: Int[Tensor, "t p g d"],
        scales: Float[Tensor, "t p g"],
        out: Float[Tensor, "t p g d"] | None = None,
    ) -> Float[Tensor, "t p g d"]:
        """The vectors that stored bits and scales stand for, in fp32; in `out`, if it is given."""
        if self.eight_bits == "int8":
            return torch.mul(bits, scales[..., None], out=out)
        numbers = bits.view(torch.float8_e4m3fn)
        numbers = numbers.float() if out is None else out.copy_(numbers)
        return numbers.mul_(scales[..., None])


class PagedRows:
    """Allocates an arena's rows to lists that grow at their end, one page at a time.

    A list may begin with rows of other lists, which it borrows. `prefixes` keeps such rows when the list
    that they belong to is released.

    Args:
        num_pages: number of pages.
        page_size: number of rows in a page.
        num_lists: number of lists.
        max_rows: largest length of a list.
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
        self.row_of = torch.zeros(num_lists, self._width(max_rows), dtype=torch.long, device=device)
        """Row of each entry of each list."""
        self.counts = torch.zeros(num_lists, dtype=torch.long, device=device)
        self.borrowed = torch.zeros_like(self.counts)
        """Number of entries at the beginning of each list whose rows belong to other lists."""
        self.kept: set[int] = set()
        """Pages that are not freed with their list."""
        self.num_idle = 0
        """Number of kept pages that no list uses."""
        self.reclaim: Callable[[int], None] = lambda count: None
        """Called to free a number of idle pages."""
        # A stack: the first `_num_free` entries are free pages. It is a tensor, so that a graph can take
        # pages from it; `_top` is the number of entries inside a graph, see `append_in_graph`. While
        # graphs are under way, the host does not know it, and pages that it returns wait.
        self._stack = torch.arange(num_pages - 1, -1, -1, device=device)
        self._num_free = num_pages
        self._top = torch.zeros(1, dtype=torch.long, device=device)
        self._num_graphs = 0
        self._returned: list[int] = []
        self._in_page = torch.arange(page_size, device=device)

    @property
    def pages_in_use(self) -> int:
        return self.num_pages - self.pages_free

    @property
    def pages_free(self) -> int:
        """Number of pages that are free, or idle and therefore free when they are needed."""
        return self._num_free + self.num_idle

    @property
    def free_pages(self) -> list[int]:
        """The pages that are free; the last one is taken first."""
        return self._stack[: self._num_free].tolist()

    def has_free(self, num_rows: int) -> bool:
        """Whether so many further rows fit in any case: a list opens at most one page for each."""
        return num_rows <= self._num_free

    def pages_for(self, count: int) -> int:
        """Number of pages of a list of `count` rows."""
        return -(-count // self.page_size)

    def pages_needed(self, lists: Int[Tensor, " t"]) -> int:
        """Number of additional pages that `append` to these lists would need."""
        added = torch.bincount(lists, minlength=len(self.counts))
        own = self.counts - self.borrowed
        return int((self._pages(own + added) - self._pages(own)).sum())

    def fits(self, lists: Int[Tensor, " t"]) -> bool:
        """Whether there are enough pages for `append` to these lists. Reclaims idle pages if needed."""
        if self.has_free(len(lists)):
            return True
        missing = self.pages_needed(lists) - self._num_free
        if missing > 0:
            self.reclaim(missing)
        return missing <= 0 or self.pages_needed(lists) <= self._num_free

    def reserve(self, num_rows: int) -> bool:
        """Whether so many further rows fit in any case, once idle pages have been reclaimed for them."""
        if not self.has_free(num_rows):
            self.reclaim(num_rows - self._num_free)
        return self.has_free(num_rows)

    def append(
        self, lists: Int[Tensor, " t"], are_distinct: bool = False
    ) -> tuple[Int[Tensor, " t"], Int[Tensor, " t"]]:
        """Extend lists by one entry for each occurrence in `lists`.

        Args:
            are_distinct: whether the caller knows that no list occurs twice.

        Returns:
            The indices of the new entries in their lists, and their rows.
        """
        if not len(lists):
            return lists, lists
        places = self.counts.index_select(0, lists)
        if are_distinct:
            self.counts.index_copy_(0, lists, places + 1)
        else:
            places = places + _rank_among_equals(lists)
            self.counts.index_add_(0, lists, torch.ones_like(lists))
        own_places = places - self.borrowed.index_select(0, lists)
        opens_page = (own_places % self.page_size == 0).nonzero()[:, 0]
        if len(opens_page):
            pages = self._taken(len(opens_page))
            columns = places[opens_page, None] + self._in_page
            rows = pages[:, None] * self.page_size + self._in_page
            self.row_of[lists[opens_page, None], columns] = rows
        return places, self.row_of[lists, places]

    def begin_graph(self) -> None:
        """Prepare calls of `append_in_graph`, for whose rows there must be free pages (`reserve`).

        A further graph may begin before the last one has ended.
        """
        if not self._num_graphs:
            self._top.fill_(self._num_free)
        self._num_graphs += 1

    def append_in_graph(
        self, lists: Int[Tensor, " t"], is_new: Bool[Tensor, " t"]
    ) -> tuple[Int[Tensor, " t"], Int[Tensor, " t"]]:
        """`append` as arithmetic on the device, whose shapes do not depend on values.

        Args:
            is_new: which of the tokens are real. The others must name lists of a spare slot, which
                stay empty; the last list must be one of these.

        Returns:
            As `append`. Places and rows of tokens that are not real are of no use.
        """
        index = torch.arange(len(lists), device=lists.device)
        is_before = (lists[:, None] == lists) & (index[:, None] > index) & is_new
        places = self.counts[lists] + is_before.sum(dim=1)
        self.counts.index_add_(0, lists, is_new.long())
        opens_page = is_new & ((places - self.borrowed[lists]) % self.page_size == 0)
        num_taken = opens_page.long().cumsum(0)
        pages = self._stack[(self._top - num_taken).clamp(0, self._stack.shape[0] - 1)]
        self._top.sub_(num_taken[-1:])
        # What opens no page writes into the last list, which nobody reads.
        target = torch.where(opens_page, lists, self.row_of.shape[0] - 1)
        columns = torch.where(opens_page, places, 0)[:, None] + self._in_page
        rows = pages[:, None] * self.page_size + self._in_page
        self.row_of.index_put_((target[:, None], columns), rows)
        return places, self.row_of[lists, places]

    @property
    def num_free_in_graph(self) -> Int[Tensor, " 1"]:
        """Number of free pages after calls of `append_in_graph`, to be passed to `end_graph`."""
        return self._top

    def end_graph(self, num_free: int) -> None:
        """Take note of the pages that the first of the graphs under way has taken."""
        self._num_free = num_free
        self._num_graphs -= 1
        if not self._num_graphs:
            returned, self._returned = self._returned, []
            self._put_back(returned)

    def release(self, lists: Int[Tensor, " l"]) -> None:
        """Empty some lists, and free their pages except those that are kept."""
        begins = self.borrowed[lists]
        used = self._pages(self.counts[lists] - begins)
        column = torch.arange(self.row_of.shape[1] // self.page_size, device=lists.device)
        is_used = column < used[:, None]  # [l p]
        columns = (begins[:, None] + column * self.page_size).where(is_used, 0)
        first_rows = self.row_of[lists].gather(1, columns)
        pages = (first_rows[is_used] // self.page_size).tolist()
        self._put_back([page for page in pages if page not in self.kept])
        self.counts[lists] = 0
        self.borrowed[lists] = 0

    def borrow(self, lists: Int[Tensor, " l"], counts: Int[Tensor, " l"]) -> None:
        """Let lists without rows of their own begin with rows of others, which are in `row_of`."""
        assert torch.equal(self.counts[lists], self.borrowed[lists]), "the lists have rows"
        self.counts[lists] = counts
        self.borrowed[lists] = counts

    def discard(self, pages: Iterable[int]) -> None:
        """Free kept pages that no list uses."""
        self.kept.difference_update(pages)
        self._put_back(list(pages))

    def grow(self, num_pages: int) -> None:
        """Add free pages; the arena must grow by the same rows."""
        first, device = self.num_pages, self._stack.device
        added = torch.arange(first + num_pages - 1, first - 1, -1, device=device)
        self._stack = torch.cat([added, self._stack])  # those that there were are taken first
        self._num_free += num_pages
        self.num_pages += num_pages

    def lengthen(self, max_rows: int) -> None:
        """Allow lists of up to `max_rows` rows."""
        columns = self._width(max_rows) - self.row_of.shape[1]
        self.row_of = F.pad(self.row_of, (0, max(0, columns)))

    def truncate(self, counts: Int[Tensor, " l"]) -> None:
        """Shorten every list to the given number of entries, and free pages that become empty."""
        assert not self.kept, "lists that share rows cannot be shortened"
        before, after = self._pages(self.counts), self._pages(counts)
        first_rows = self.row_of[:, :: self.page_size]
        column = torch.arange(first_rows.shape[1], device=counts.device)
        is_freed = (column >= after[:, None]) & (column < before[:, None])
        self._put_back((first_rows[is_freed] // self.page_size).tolist())
        self.counts = counts.clone()

    def select(self, lists: Int[Tensor, " l"]) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
        """Replace each list i by a copy of list `lists[i]`, which may occur repeatedly.

        Returns:
            For each new page, in order, the old page from which the arena must copy its rows, and the
            new list that it belongs to.
        """
        assert not self.kept, "lists that share rows cannot be copied"
        counts = self.counts[lists]
        used = self._pages(counts)
        first_rows = self.row_of[lists, :: self.page_size]
        column = torch.arange(first_rows.shape[1], device=lists.device)
        is_used = column < used[:, None]
        pages = (used.cumsum(0) - used)[:, None] + column
        rows = pages[..., None] * self.page_size + self._in_page
        self.row_of = torch.where(is_used[..., None], rows, 0).flatten(1)
        self.counts, self.num_pages = counts, int(used.sum())
        self._stack, self._num_free = counts.new_zeros(self.num_pages), 0
        self.borrowed = torch.zeros_like(counts)
        owners = torch.arange(len(lists), device=lists.device).repeat_interleave(used)
        return first_rows[is_used] // self.page_size, owners

    def _taken(self, count: int) -> Int[Tensor, " p"]:
        """Take pages from the stack, the last one first."""
        assert count <= self._num_free, "ask pages_needed first"
        self._num_free -= count
        return self._stack[self._num_free : self._num_free + count].flip(0)

    def _put_back(self, pages: Sequence[int]) -> None:
        """Put free pages onto the stack."""
        if self._num_graphs:
            self._returned += pages
        elif pages:
            end = self._num_free + len(pages)
            self._stack[self._num_free : end] = torch.tensor(pages, device=self._stack.device)
            self._num_free = end

    def _width(self, max_rows: int) -> int:
        # The page that a list opens after borrowed rows may begin anywhere, and end beyond `max_rows`.
        return (self.pages_for(max_rows) + 1) * self.page_size

    def _pages(self, counts: Tensor) -> Tensor:
        return (counts + self.page_size - 1) // self.page_size


def _rank_among_equals(lists: Int[Tensor, " t"]) -> Int[Tensor, " t"]:
    """For each entry, how many of the entries before it are equal to it."""
    ordered, order = lists.sort(stable=True)
    begins = torch.searchsorted(ordered, ordered)
    rank = torch.empty_like(lists)
    rank[order] = torch.arange(len(lists), device=lists.device) - begins
    return rank
