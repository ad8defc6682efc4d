"""IncrementalDecoder: a batch of texts that grow together; each call continues all of them.

The engine serves requests that come and go. This class is for callers with a loop of their own, which
pass the next tokens of every text and get a state for each token. Memory grows as needed, to at most
twice the rows that the KV policy keeps. Texts can be reordered and copied (for beams), and cut (for
rejected drafts).

Legend: `b` texts, `q` new tokens of each, `s` columns seen before, `h` hidden.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor_layers.generation.cache import Caches, CacheSettings, KVArena, PagedRows
from mor_layers.generation.tick.cached_model import CachedModel
from mor_layers.generation.tick.chain import ChainedCaches, cached_chain, caches_of
from mor_layers.generation.tick.in_flight import Pool, Rows
from mor_layers.models import MoRTransformer


class IncrementalDecoder:
    """Keys and values of a batch of texts, and the passes that lengthen them.

    Args:
        model: the model, on the device and in the precision to use. It is put into evaluation mode.
        num_texts: number of texts.

    Raises:
        ValueError: experts drop tokens.
    """

    def __init__(self, model: MoRTransformer, num_texts: int) -> None:
        length = CacheSettings.page_size
        settings = CacheSettings.for_all_steps(model, length, num_slots=1)
        self.model, self._settings = model, replace(settings, num_slots=num_texts)
        self.chain = cached_chain(model, self._settings)
        self.cached = self.chain[0]
        device = self.cached.device
        self.is_token = torch.zeros(num_texts, 0, dtype=torch.bool, device=device)
        """Which columns of each text hold a token, `[b s]`."""
        nothing = torch.zeros(num_texts, length, dtype=torch.long, device=device)
        self._depths = [nothing.clone() for _ in self.chain]  # of each recursion

    @property
    def caches(self) -> Caches | ChainedCaches:
        return caches_of(self.chain, self._settings)

    @property
    def depths(self) -> Int[Tensor, "b m"]:
        """Steps that each token ran, by its index among the text's tokens."""
        return sum(self._depths[1:], self._depths[0])

    @property
    def num_texts(self) -> int:
        return len(self.is_token)

    @property
    def num_columns(self) -> int:
        """Length of the texts, including padding."""
        return self.is_token.shape[1]

    @torch.no_grad()
    def extend(
        self, ids: Int[Tensor, "b q"], is_token: Bool[Tensor, "b q"] | None = None
    ) -> Float[Tensor, "b q h"]:
        """Continue every text.

        Args:
            ids: the next tokens.
            is_token: False where `ids` has padding, which may be anywhere. Default: no padding.

        Returns:
            States after the last norm; zeros for padding.

        Raises:
            ValueError: the number of rows differs from the number of texts, or the mask has another
                shape.
        """
        if is_token is None:
            is_token = torch.ones_like(ids, dtype=torch.bool)
        if ids.dim() != 2 or len(ids) != self.num_texts or is_token.shape != ids.shape:
            raise ValueError(
                f"ids {tuple(ids.shape)} and is_token {tuple(is_token.shape)} must both be [b q] "
                f"with b={self.num_texts}, the texts held."
            )
        weight = self.model.embedding.weight
        states = weight.new_zeros(*ids.shape, weight.shape[1])
        if is_token.any():
            pool, last = self.enter(ids, is_token), len(self.chain) - 1
            for link in range(last):
                exited, _ = self.recur(pool, link=link)
                pool = self._pass_on(Rows.joined(exited), link)
            exited, _ = self.recur(pool, link=last)
            states[is_token] = self.leave(Rows.joined(exited)).hidden
        else:
            self.is_token = torch.cat([self.is_token, is_token], dim=1)
        return states

    # The three parts of `extend`, for callers that do something in between, such as `speculation`.

    def enter(self, ids: Int[Tensor, "b q"], is_token: Bool[Tensor, "b q"]) -> Pool:
        """Run the next tokens of some texts through the layers before the recursion."""
        before = self.is_token.sum(dim=1)
        self.is_token = torch.cat([self.is_token, is_token], dim=1)
        rank = is_token.long().cumsum(dim=1) - 1
        slots, columns = is_token.nonzero(as_tuple=True)
        places = rank[slots, columns]
        positions = before[slots] + places
        self._lengthen(int(positions.max()) + 1)
        for cached in self.chain:
            cached.are_alone = ids.shape[1] == 1
        _reserve_outer(self.cached, slots)
        return self.cached.begin(ids[slots, columns], slots, positions, places)

    def recur(self, pool: Pool, until: int | None = None, link: int = 0) -> tuple[list[Rows], Pool]:
        """Run tokens, all of which are at one step, until they exit.

        Args:
            until: stop when the tokens have run so many steps. None: when all have exited.
            link: the recursion that they run, by its 0-based number.

        Returns:
            The tokens that exited, in the order of their exits, and those that did not.
        """
        cached, policy, step = self.chain[link], self.chain[link].policy, pool.step
        exited: list[Rows] = []
        while len(pool) and step != until:
            pool, exiting = cached.route(pool)
            if exiting is not None:
                exited.append(exiting)
            if len(pool):
                running, unstored = cached.in_flight(pool)
                if unstored is not None:  # after cuts, their list may be longer than the text
                    most = int(unstored.slots.bincount().max())
                    longest = int(policy.pages.counts.max()) + most
                    policy.pages.lengthen(max(longest, cached.settings.max_length))
                _reserve(policy.pages, cached.caches.inner, policy.pages_needed(running, unstored))
                pool, step = cached.run(pool), step + 1
        return exited, pool

    def leave(self, exited: Rows) -> Rows:
        """Run tokens that have left the last recursion through the layers after it, and the last norm.

        Returns:
            The same tokens, ordered by text and position.
        """
        rows = self._in_order(exited, len(self.chain) - 1)
        ended = self.chain[-1].end(rows.hidden, rows.slots, rows.positions)
        return replace(rows, hidden=self.model.norm(ended))

    def _pass_on(self, exited: Rows, link: int) -> Pool:
        """Run tokens that have left a recursion through the layers between it and the next one."""
        rows, cached = self._in_order(exited, link), self.chain[link + 1]
        ended = self.chain[link].end(rows.hidden, rows.slots, rows.positions)
        _reserve_outer(cached, rows.slots)
        return cached.begin_from(ended, rows.slots, rows.positions, rows.places)

    def _in_order(self, exited: Rows, link: int) -> Rows:
        """Tokens that have left a recursion, ordered by text and position, with their depths stored."""
        depths = self._depths[link]
        rows = exited.take((exited.slots * depths.shape[1] + exited.positions).argsort())
        depths[rows.slots, rows.positions] = rows.steps
        return rows

    @torch.no_grad()
    def select(self, texts: Int[Tensor, " b"]) -> None:
        """Replace each text i by a copy of text `texts[i]`."""
        texts = texts.to(self.cached.device)
        if torch.equal(texts, torch.arange(self.num_texts, device=texts.device)):
            return
        self.is_token = self.is_token[texts]
        self._depths = [depths[texts] for depths in self._depths]
        for cached in self.chain:
            size, caches = cached.settings.page_size, cached.caches
            caches.inner.take_pages(caches.policy.select(texts), size)
            caches.outer.take_pages(caches.outer_pages.select(texts)[0], size)
            cached.unstored = [_copied(rows, texts) for rows in cached.unstored]
            cached.settings = replace(cached.settings, num_slots=len(texts))

    def cut(self, num_columns: int) -> None:
        """Keep only the first columns.

        Raises:
            ValueError: there are fewer columns.
        """
        if not 0 <= num_columns <= self.num_columns:
            raise ValueError(f"cannot keep {num_columns} columns of {self.num_columns}.")
        self.is_token = self.is_token[:, :num_columns]
        self._rewind()

    def keep(self, counts: Int[Tensor, " b"]) -> None:
        """Keep only the first `counts[i]` tokens of each text i."""
        self.is_token &= self.is_token.long().cumsum(dim=1) <= counts[:, None]
        has_token = self.is_token.any(dim=0)
        last = has_token.nonzero()[-1:].flatten().tolist()
        self.is_token = self.is_token[:, : 1 + last[0] if last else 0]
        self._rewind()

    def _rewind(self) -> None:
        """Remove the tokens that `is_token` does not have from the caches."""
        lengths = self.is_token.sum(dim=1)
        place = torch.arange(self._depths[0].shape[1], device=lengths.device)
        self._depths = [depths.where(place < lengths[:, None], 0) for depths in self._depths]
        for cached, depths in zip(self.chain, self._depths, strict=True):
            if self._has(cached.caches.inner):
                cached.policy.rewind(depths)
            if self._has(cached.caches.outer):
                cached.outer_pages.truncate(lengths)
            cached.unstored = [
                rows.take((rows.positions < lengths[rows.slots]).nonzero()[:, 0])
                for rows in cached.unstored
            ]

    def __deepcopy__(self, memo: dict[int, Any]) -> "IncrementalDecoder":
        """A second batch with the same texts, for the same model."""
        from copy import deepcopy

        memo |= {id(module): module for module in self.model.modules()}
        copy = object.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def _lengthen(self, length: int) -> None:
        settings = self.cached.settings
        if length <= settings.max_length:
            return
        longer = max(length, 2 * settings.max_length)
        added = longer - self._depths[0].shape[1]
        self._depths = [F.pad(depths, (0, added)) for depths in self._depths]
        for cached in self.chain:
            cached.settings = replace(cached.settings, max_length=longer)
            cached.outer_pages.lengthen(longer)
            cached.policy.lengthen(longer)

    @staticmethod
    def _has(arena: KVArena) -> bool:
        return arena.data.shape[0] > 0


def _reserve_outer(cached: CachedModel, slots: Int[Tensor, " t"]) -> None:
    """Make sure that the layers that run once have rows for new tokens."""
    pages = cached.outer_pages
    _reserve(pages, cached.caches.outer, pages.pages_needed(slots))


def _reserve(pages: PagedRows, arena: KVArena, needed: int) -> None:
    """Make sure that `needed` pages are free; growing at least doubles the memory."""
    missing = needed - pages.pages_free
    if missing > 0 and arena.data.shape[0]:
        added = max(missing, pages.num_pages)
        pages.grow(added)
        arena.grow(added * pages.page_size)


def _copied(rows: Rows, texts: Tensor) -> Rows:
    """The tokens of each text after text i is replaced by a copy of text `texts[i]`."""
    text, index = (texts[:, None] == rows.slots).nonzero(as_tuple=True)
    copies = rows.take(index)
    return replace(copies, notes=torch.cat([text[None], copies.notes[1:]]))
