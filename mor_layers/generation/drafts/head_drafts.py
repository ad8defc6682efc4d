"""Drafts from the heads of multi-token prediction, for speculative decoding.

The first head continues from the state of the last token that the model has run, and each further head
from the one before. A head attends to its own rows of earlier tokens. Rows are stored by position, so
those that came from a rejected draft are written anew when the right token is known.

Legend: `b` texts, `o` texts that go on, `w` positions of each that the heads run, `m` positions held,
`h` hidden, `g` key-value heads, `d` head size, `v` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from mor_layers.models import MoRTransformer, PredictionHead
from mor_layers.recursion import StepContext
from mor_layers.selection import Tokens

Choose = Callable[[Float[Tensor, "o h"]], tuple[Int[Tensor, " o"], Float64[Tensor, "o v"]]]
"""From states to the drafted tokens and what each was drawn from."""


class HeadDrafts:
    """The tokens of a batch of texts, the states that the model gave them, and the heads' rows.

    Args:
        num_texts: number of texts, each empty at first.
        num_drafts: how many heads are used.
    """

    def __init__(self, model: MoRTransformer, num_texts: int, num_drafts: int) -> None:
        self.model = model
        found = model.prediction_heads[:num_drafts]
        self.heads: list[PredictionHead] = list(found)  # type: ignore[arg-type]
        weight = model.embedding.weight
        self.ids = torch.zeros(num_texts, 0, dtype=torch.long, device=weight.device)
        """All tokens, `[b m]`. Behind the last one, those of the latest drafts."""
        self.states = weight.new_zeros(num_texts, 0, weight.shape[1])
        """After the last norm, of the tokens that the model has run, `[b m h]`."""
        self.lengths = self.ids.new_zeros(num_texts)
        """Tokens of each text. The model has run all but the last one."""
        self._first = self.ids.new_zeros(num_texts)
        """The first position of each text whose rows may be of other tokens."""
        self._rows = [_HeadRows() for _ in self.heads]

    def append(
        self,
        texts: Int[Tensor, " o"],
        ids: Int[Tensor, "o k"],
        counts: Int[Tensor, " o"],
        states: Float[Tensor, "o k h"],
        following: Int[Tensor, " o"],
    ) -> None:
        """Add tokens that the model has run, and the one that follows them.

        Args:
            ids: tokens of these texts; the first is the last one held so far, if there is one.
            counts: how many of them belong to each text.
            states: what the model gave them.
            following: the token after them, which the model has not run.
        """
        begin = (self.lengths[texts] - 1).clamp(min=0)
        place = torch.arange(ids.shape[1], device=ids.device)
        self._reserve(int((begin + counts).max()) + 1 + len(self.heads))
        row, column = (place < counts[:, None]).nonzero(as_tuple=True)
        at = texts[row], begin[row] + column
        self.ids[at], self.states[at] = ids[row, column], states[row, column]
        self.ids[texts, begin + counts] = following
        self.lengths[texts] = begin + counts + 1

    def draft(
        self, texts: Int[Tensor, " o"], num_drafts: int, choose: Choose
    ) -> tuple[Int[Tensor, "o k"], Float64[Tensor, "o k v"]]:
        """Draft tokens behind the last one of each of these texts.

        A text is drafted for until it has ended, and with no more drafts than the time before, as heads
        that were left out have no rows of later tokens.

        Returns:
            The tokens, and what each was drawn from.
        """
        ends = self.lengths[texts] - 2  # the last position that has a state
        first = self._first[texts]
        place = torch.arange(int((ends - first).max()) + 1, device=texts.device)
        positions = first[:, None] + place  # [o w]
        is_token = positions <= ends[:, None]
        positions = positions.where(is_token, ends[:, None])
        states = self.states[texts[:, None], positions].transpose(0, 1)  # [o w h] -> [w o h]
        last = (ends - first, torch.arange(len(texts), device=texts.device))
        tokens, chances = list[Tensor](), list[Tensor]()
        used = zip(self.heads[:num_drafts], self._rows, strict=False)
        for distance, (head, rows) in enumerate(used, start=1):
            later = self.ids[texts[:, None], positions + distance].T  # [o w] -> [w o]
            context = _HeadContext(
                0,
                Tokens(positions.T, int(positions.max()) + 1, is_padding=~is_token.T),
                rows=rows,
                texts=texts,
                num_texts=len(self.ids),
            )
            states = head(states, self.model.embedding(later), context)
            token, chance = choose(states[last])
            self.ids[texts, ends + 1 + distance] = token
            tokens.append(token)
            chances.append(chance)
        # What the second and further heads ran on is right only as far as the tokens are known.
        self._first[texts] = (ends + 2 - len(self.heads)).clamp(min=0)
        return torch.stack(tokens, dim=1), torch.stack(chances, dim=1)

    def _reserve(self, length: int) -> None:
        if length > self.ids.shape[1]:
            added = max(length, 2 * self.ids.shape[1]) - self.ids.shape[1]
            self.ids = F.pad(self.ids, (0, added))
            self.states = F.pad(self.states, (0, 0, 0, added))


@dataclass
class _HeadRows:
    """Keys and values of one head's layer, or its latent rows, `[m b g d]`, by position."""

    held: list[Tensor] = field(default_factory=list)

    def write(
        self,
        rows: tuple[Tensor, Tensor],
        tokens: Tokens,
        texts: Int[Tensor, " o"],
        num_texts: int,
    ) -> tuple[Tensor, Tensor]:
        """Store `[w o g d]`, and return those of all positions up to the last of these tokens."""
        length = tokens.sequence_length
        if not self.held:
            self.held = [new.new_zeros(0, num_texts, *new.shape[2:]) for new in rows]
        missing = length - len(self.held[0])
        if missing > 0:
            added = max(missing, len(self.held[0]))
            self.held = [F.pad(old, (0, 0, 0, 0, 0, 0, 0, added)) for old in self.held]
        assert tokens.is_padding is not None
        place, text = (~tokens.is_padding).nonzero(as_tuple=True)
        for old, new in zip(self.held, rows, strict=True):
            old[tokens.positions[place, text], texts[text]] = new[place, text]
        key, value = (old[:length, texts] for old in self.held)
        return key, value


@dataclass(frozen=True)
class _HeadContext(StepContext):
    """A pass of a head over the newest positions of some texts."""

    rows: _HeadRows
    texts: Int[Tensor, " o"]
    num_texts: int

    def exchange(
        self, layer: int, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert key is not None and value is not None
        return self.rows.write((key, value), self.tokens, self.texts, self.num_texts)

    @cached_property
    def causal_mask(self) -> Bool[Tensor, "o 1 w m"]:
        """Rows are those of all positions, in order."""
        positions = self.tokens.positions.T[:, :, None]
        held = torch.arange(self.tokens.sequence_length, device=positions.device)
        return (held <= positions)[:, None]
