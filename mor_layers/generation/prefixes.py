"""Prefix caching: sequences that begin with the same tokens share the rows of these tokens.

What a token leaves in the cache depends on the token and on those before it, and on nothing else,
because generation routes causally and every token attends to its own text only. A sequence can therefore
begin with the rows that another one has computed, under every KV policy: its tables name the same rows.

The tokens of a prompt are divided into blocks. Blocks that have been computed form a tree, in which a
path from the root spells the tokens of a prefix; tokens are compared, not hashes of them. Steps keep
different tokens, so a block has a list of rows for each table of the policy, and their lengths differ.

    root ── "You are a help" ── "ful assistant." ── " What is the ca"
                                               └─── " Write a poem a"

A page belongs to the block whose tokens opened it, from when the block is stored until it is evicted.
Blocks that no running sequence uses are idle. They are evicted when pages are needed, the least recently
used first, and the end of a prefix before its beginning.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from mor_layers.generation.cache.memory import PagedRows
from mor_layers.generation.model_state import ModelState
from mor_layers.generation.tick.cached_model import CachedModel

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Block:
    """Consecutive tokens whose rows are in the cache."""

    tokens: Tokens
    """The tokens. The root has none."""
    parent: "Block | None"
    """The block of the tokens before; None for the root."""
    depths: list[int]
    """Number of steps that each token took."""
    rows: tuple[list[int], ...]
    """The rows of the tokens in each table, see `Caches.tables`."""
    ends: tuple[int, ...]
    """Number of entries of each table, from the beginning of the text to the end of this block."""
    pages: tuple[list[int], ...]
    """The pages that the block owns: of the layers that run once, and of the recursion."""
    writer: int | None
    """The slot of the sequence that computed it, while this runs."""
    num_users: int = 0
    """Number of running sequences that begin with the blocks up to this one."""
    children: dict[Tokens, "Block"] = field(default_factory=dict)
    is_forgotten: bool = False
    """Whether it has been taken out of the tree."""


@dataclass
class _Sequence:
    """A running sequence that may share its prefix."""

    tokens: list[int]
    """Its tokens. The engine appends to this list."""
    depths: list[int]
    """Number of steps of those that are computed. The engine appends to this list."""
    path: list[Block]
    """The root, and the blocks that it begins with."""
    awaited: tuple[Block, Tokens] | None = None
    """The block that it is computing, as its parent and its tokens."""
    is_closed: bool = False
    """Whether no more of its blocks are stored."""

    @property
    def last(self) -> Block:
        return self.path[-1]


class PrefixCache:
    """The prefixes that sequences of an engine share.

    The engine opens a sequence when it gets a slot, lets it share what there is before its first token
    runs, and says when its tokens begin to run. `store` then keeps the blocks of prompts as they
    are completed. When the sequence leaves its slot, `keep` does the same for generated tokens.

    Args:
        cached: the model with its caches. Blocks have as many tokens as a page has rows.
    """

    def __init__(self, cached: CachedModel) -> None:
        self._cached, self._caches = cached, cached.caches
        settings = cached.settings
        self._sharing, self._size = settings.prefix_sharing, settings.page_size
        self.readers: set[int] = set()
        """Slots of sequences none of whose tokens have begun to run, so that they may share some."""
        self.pages_borrowed = [0, 0]
        """Pages of each kind that running sequences use, and whose writers have left."""
        self._paged: tuple[PagedRows, PagedRows] = (
            self._caches.outer_pages,
            self._caches.policy.pages,
        )
        for kind, pages in enumerate(self._paged):
            pages.reclaim = partial(self._evict, kind)
        self._model, self._is_checked = ModelState(cached.model), False
        self._roots: dict[tuple[str, str], Block] = {}
        self._sequences: dict[int, _Sequence] = {}
        self._computing: dict[tuple[Block, Tokens], int] = {}
        self._idle: OrderedDict[Block, None] = OrderedDict()  # the next one to evict comes first

    @property
    def num_blocks_idle(self) -> int:
        """Number of blocks that no running sequence uses."""
        return len(self._idle)

    def begin_tick(self) -> None:
        """Take note that the model may have changed since the last tick."""
        self._is_checked = False

    def open(
        self, slot: int, tokens: list[int], depths: list[int], client: str = "", salt: str = ""
    ) -> None:
        """Let a sequence that has got a slot take part.

        Args:
            tokens: its tokens; the caller appends those that are generated.
            depths: for the number of steps of each token; the caller appends them.
            client: who sent it.
            salt: separates requests that must not share prefixes.
        """
        if self._sharing == "off":
            return
        self._forget_if_changed()
        key = (client if self._sharing == "client" else "", salt)
        root = self._roots.get(key)
        if root is None:
            ends = (0,) * len(self._caches.tables(slot))
            root = self._roots[key] = Block((), None, [], (), ends, ([], []), None)
        root.num_users += 1
        self._sequences[slot] = _Sequence(tokens, depths, [root])
        self.readers.add(slot)

    def share(self, slots: Iterable[int]) -> tuple[dict[int, list[int]], set[int]]:
        """Let sequences whose tokens have not begun to run begin with rows that are in the cache.

        If several need the same block that is not in the cache, one of them computes it and the others
        wait for it.

        Args:
            slots: the sequences, which are among the `readers`, in the order in which they continue.

        Returns:
            The depths of the tokens that each sequence need not compute, and the slots of the
            sequences that wait. The last token is always computed, for its logits.
        """
        found, waiting = {}, set()
        claimed = set(self._computing)
        for slot in slots:
            sequence = self._sequences[slot]
            if sequence.last.is_forgotten:
                continue
            blocks = self._take(slot, sequence)
            if blocks:
                found[slot] = [depth for block in blocks for depth in block.depths]
            wanted = self._next(sequence, leaves=1)
            if wanted in claimed:
                waiting.add(slot)
            elif wanted is not None:
                claimed.add(wanted)
        return found, waiting

    def begin(self, slots: Iterable[int]) -> None:
        """Take note that tokens of these sequences begin to run."""
        if not self.readers:
            return
        for slot in self.readers.intersection(slots):
            self.readers.remove(slot)
            self._await_next(slot, self._sequences[slot])

    def store(self) -> None:
        """Keep the blocks of prompts that are complete. Call this after each tick."""
        for slot in list(self._computing.values()):
            self.keep(slot)

    def keep(self, slot: int) -> None:
        """Keep the blocks of a sequence that are complete."""
        sequence = self._sequences.get(slot)
        if sequence is None or sequence.is_closed or sequence.last.is_forgotten:
            return
        begin = (len(sequence.path) - 1) * self._size
        # An exited token has all its rows one tick later under `exit_state`.
        num_stored = self._cached.num_stored(slot, len(sequence.depths))
        count = (num_stored - begin) // self._size
        if count <= 0:
            return
        self._forget_if_changed()
        if not sequence.last.is_forgotten:
            self._write(slot, sequence, begin, count)
        self._await_next(slot, sequence)

    def leave(self, slot: int) -> None:
        """Take note that a sequence has left its slot, and that its rows have been released."""
        sequence = self._sequences.pop(slot, None)
        if sequence is None:
            return
        self.readers.discard(slot)
        self._stop_awaiting(sequence)
        # The end of the prefix becomes idle first, so that it is evicted before the beginning.
        root, *blocks = sequence.path
        for block in reversed(blocks):
            was_borrowed = block.writer is None
            if block.writer == slot:
                block.writer = None
            block.num_users -= 1
            if block.num_users == 0:
                if was_borrowed:
                    self._count(block, borrowed=-1)
                self._retire(block)
            elif not was_borrowed and block.writer is None:
                self._count(block, borrowed=1)
        root.num_users -= 1
        self._prune(root)

    def is_borrower(self, slot: int) -> bool:
        """Whether a sequence uses rows that it has not computed itself."""
        sequence = self._sequences.get(slot)
        return sequence is not None and any(block.writer != slot for block in sequence.path[1:])

    def forget(self, slot: int) -> None:
        """Share nothing that a sequence has used or computed with later ones."""
        sequence = self._sequences.get(slot)
        if sequence is None:
            return
        self._stop_awaiting(sequence)
        self.readers.discard(slot)
        root, *blocks = sequence.path
        if blocks and not blocks[0].is_forgotten:
            self._take_out(blocks[0])
        # Under a root that is not in the tree, nothing is stored.
        sequence.path[0] = replace(root, num_users=1, children={}, is_forgotten=True)
        root.num_users -= 1
        self._prune(root)

    def clear(self) -> None:
        """Forget everything. Sequences under way keep their rows, and share them with no others."""
        for root in self._roots.values():
            root.is_forgotten = True
            for block in list(root.children.values()):
                self._take_out(block)
        self._roots.clear()
        for sequence in self._sequences.values():
            self._stop_awaiting(sequence)
        self.readers.clear()

    def _forget_if_changed(self) -> None:
        if not self._is_checked and self._model.has_changed():
            self.clear()
        self._is_checked = True  # the model does not change within a tick

    def _next(self, sequence: _Sequence, leaves: int = 0) -> tuple[Block, Tokens] | None:
        """The block after the path of a sequence, as its parent and its tokens.

        Args:
            leaves: number of known tokens that there must be after it.
        """
        begin = (len(sequence.path) - 1) * self._size
        end = begin + self._size
        if end + leaves > len(sequence.tokens):
            return None
        return sequence.last, tuple(sequence.tokens[begin:end])

    def _take(self, slot: int, sequence: _Sequence) -> list[Block]:
        """Let a sequence use all blocks in the tree that continue its path."""
        before, blocks = sequence.last, []
        while (wanted := self._next(sequence, leaves=1)) is not None:
            block = wanted[0].children.get(wanted[1])
            if block is None:
                break
            self._use(block)
            sequence.path.append(block)
            blocks.append(block)
        if not blocks:
            return blocks
        ends = blocks[-1].ends
        for i, table in enumerate(self._caches.tables(slot)):
            rows = [row for block in blocks for row in block.rows[i]]
            table[before.ends[i] : ends[i]] = torch.tensor(rows, dtype=torch.long)
        self._caches.borrow(slot, ends)
        return blocks

    def _write(self, slot: int, sequence: _Sequence, begin: int, count: int) -> None:
        """Store the next `count` blocks of a sequence, the first of which begins at `begin`."""
        size, first = self._size, sequence.last
        depths = [
            sequence.depths[at : at + size] for at in range(begin, begin + count * size, size)
        ]
        lengths = [self._caches.num_entries(own) for own in depths]
        begins = first.ends
        ends = [tuple(map(sum, zip(begins, *lengths[: i + 1], strict=True))) for i in range(count)]
        # One copy to the host for each table, not for each block.
        tables = [
            table[start:stop].tolist()
            for table, start, stop in zip(self._caches.tables(slot), begins, ends[-1], strict=True)
        ]
        num_outer = int(self._paged[0].num_pages > 0)
        for index, own_ends in enumerate(ends):
            tokens = tuple(sequence.tokens[begin + index * size : begin + (index + 1) * size])
            block = sequence.last.children.get(tokens)
            if block is not None and block.depths != depths[index]:
                # Computed twice, and a score so close to a threshold that rounding decided.
                sequence.is_closed = True
                return
            if block is not None:
                self._use(block)
            else:
                spans = zip(tables, begins, sequence.last.ends, own_ends, strict=True)
                rows = tuple(table[start - at : stop - at] for table, at, start, stop in spans)
                new = self._new_pages(0, rows[:num_outer]), self._new_pages(1, rows[num_outer:])
                block = Block(tokens, sequence.last, depths[index], rows, own_ends, new, slot, 1)
                sequence.last.children[tokens] = block
            sequence.path.append(block)

    def _new_pages(self, kind: int, rows: tuple[list[int], ...]) -> list[int]:
        """Those pages of the rows that no earlier block owns. They are kept from now on."""
        pages = {row // self._size for own in rows for row in own}
        new = sorted(pages - self._paged[kind].kept)
        self._paged[kind].kept.update(new)
        return new

    def _use(self, block: Block) -> None:
        if block.num_users == 0:
            del self._idle[block]
            self._count(block, idle=-1, borrowed=1)
        block.num_users += 1

    def _retire(self, block: Block) -> None:
        """Keep a block that no sequence uses any longer, unless it has been taken out of the tree."""
        if block.is_forgotten:
            self._discard(block)
            return
        self._idle[block] = None
        self._count(block, idle=1)

    def _evict(self, kind: int, count: int) -> None:
        """Free at least `count` pages of a kind, or all that are idle."""
        while count > 0 and self._idle:
            block, _ = self._idle.popitem(last=False)
            self._count(block, idle=-1)
            self._discard(block)
            count -= len(block.pages[kind])
            parent = block.parent
            assert parent is not None and not block.children
            del parent.children[block.tokens]
            self._prune(parent)

    def _take_out(self, block: Block) -> None:
        """Take a block and all that follow it out of the tree."""
        assert block.parent is not None
        del block.parent.children[block.tokens]
        rest = [block]
        while rest:
            block = rest.pop()
            block.is_forgotten = True
            rest += block.children.values()
            block.children = {}
            if block.num_users == 0:
                del self._idle[block]
                self._count(block, idle=-1)
                self._discard(block)

    def _discard(self, block: Block) -> None:
        for pages, own in zip(self._paged, block.pages, strict=True):
            pages.discard(own)

    def _count(self, block: Block, idle: int = 0, borrowed: int = 0) -> None:
        for kind, own in enumerate(block.pages):
            self._paged[kind].num_idle += idle * len(own)
            self.pages_borrowed[kind] += borrowed * len(own)

    def _prune(self, root: Block) -> None:
        """Remove a root that has no blocks and no users."""
        if root.parent is None and not root.children and not root.num_users:
            self._roots = {key: own for key, own in self._roots.items() if own is not root}

    def _await_next(self, slot: int, sequence: _Sequence) -> None:
        """Let other sequences wait for the next block of this one, if it is computing one."""
        self._stop_awaiting(sequence)
        awaited = self._next(sequence)
        if awaited is not None and not (sequence.is_closed or sequence.last.is_forgotten):
            self._computing.setdefault(awaited, slot)
            sequence.awaited = awaited if self._computing[awaited] == slot else None

    def _stop_awaiting(self, sequence: _Sequence) -> None:
        if sequence.awaited is not None:
            del self._computing[sequence.awaited]
            sequence.awaited = None
