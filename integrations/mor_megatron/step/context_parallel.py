"""Sequences over context-parallel ranks, without Transformer Engine.

Outside a recursion a rank holds two chunks of the sequence, as Megatron deals them out (zigzag): of
`2 · cp` chunks those with numbers `rank` and `2 · cp - 1 - rank`. Inside, the rows of a step lie in
sequence order, evenly and contiguously, whichever tokens were selected. Attention gathers keys and
values over the group and attends by position, exactly; queries never travel.

Legend: `s` sequence, `b` batch, `n` rows on this rank, `k` tokens that run a step, `m` tokens whose keys
they see, `g` key-value heads, `d` head size.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from mor_layers import StepContext, Tokens
from mor_layers.recursion import Exited, visible


def zigzag_positions(length: int, size: int, device: torch.device | None = None) -> Tensor:
    """Position of each row `[size n]` of a sequence that is dealt out to `size` ranks.

    Raises:
        ValueError: the sequence does not divide.
    """
    if length % (2 * size):
        raise ValueError(
            f"a sequence of {length} tokens does not divide into {2 * size} chunks, two for each of "
            f"{size} context-parallel ranks. Use a multiple of {2 * size}."
        )
    chunks = torch.arange(length, device=device).view(2, size, -1)
    return torch.cat([chunks[0], chunks[1].flip(0)], dim=1)  # chunk r, then chunk 2·size-1-r


def in_sequence_order(rows: Tensor, group: ProcessGroup) -> Tensor:
    """All ranks' zigzag rows `[n ...]` as one sequence `[s ...]`, for every rank; differentiable."""
    whole = gather_from_sequence_parallel_region(rows.contiguous(), group=group)
    positions = zigzag_positions(len(whole), group.size(), rows.device).flatten()
    return whole.index_select(0, positions.argsort())


class Relayout:
    """Rows from zigzag to contiguous order and back, over the ranks of a group.

    Args:
        length: of the sequence.
        group: context-parallel ranks; under sequence parallelism with the tensor-parallel ones, which
            split a context rank's rows contiguously.
        context_size: context-parallel ranks.
    """

    def __init__(
        self, length: int, group: ProcessGroup, context_size: int, device: torch.device
    ) -> None:
        self.group = group
        positions = zigzag_positions(length, context_size).view(group.size(), -1)
        size = positions.shape[1]
        target = positions // size  # [rank n]: where each row goes
        own = target[group.rank()]
        self._leaving = own.argsort(stable=True).to(device)
        self._sent = own.bincount(minlength=group.size()).tolist()
        arriving = positions[target == group.rank()]  # by rank that sends, in its order
        self._order = arriving.argsort().to(device)
        self._received = (target == group.rank()).sum(dim=1).tolist()

    def to_sequence(self, rows: Tensor) -> Tensor:
        """`[n ...]`, zigzag to contiguous."""
        leaving = rows.index_select(0, self._leaving)
        return all_to_all(self.group, leaving, self._received, self._sent).index_select(
            0, self._order
        )

    def to_zigzag(self, rows: Tensor) -> Tensor:
        """`[n ...]`, contiguous to zigzag."""
        leaving = rows.index_select(0, self._order.argsort())
        arrived = all_to_all(self.group, leaving, self._sent, self._received)
        return arrived.index_select(0, self._leaving.argsort())


@dataclass(frozen=True)
class GatheredStep(StepContext):
    """A step of which this rank runs some tokens, with the keys of all."""

    inner: StepContext
    """The step as a whole."""
    group: ProcessGroup
    """Context-parallel ranks."""
    multiple: int
    """The step's rows are filled up to a multiple of this."""

    @classmethod
    def of(cls, inner: StepContext, group: ProcessGroup, multiple: int) -> "GatheredStep":
        """This rank's part of a step."""
        tokens = _share(inner.tokens, group, multiple)
        return cls(inner.step, tokens, inner, group, multiple, experts=inner.experts)

    @property
    def projects_keys(self) -> bool:
        return self.inner.projects_keys

    @cached_property
    def exited(self) -> Exited | None:  # type: ignore[override]
        whole = self.inner.exited
        if whole is None:
            return None
        return Exited(_share(whole.tokens, self.group, self.multiple), whole.hidden)

    def exchange(
        self, layer: int, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Rows `[m b g d]` of all ranks, as the whole step sees them."""
        if key is None or value is None:
            return self.inner.exchange(layer, None, None)
        return self.inner.exchange(layer, self._gather(key), self._gather(value))

    @cached_property
    def causal_mask(self) -> Tensor:
        """`[b 1 k m]`; rows that hold no token see everything, so that none is empty."""
        mask = visible(self.tokens, self.inner.keys)
        if self.tokens.is_padding is not None:
            mask = mask | self.tokens.is_padding.T[:, :, None]
        return mask[:, None]

    def _gather(self, rows: Tensor) -> Tensor:
        parts = [(rows[: self.tokens.shape[0]], self.inner.tokens)]
        if self.inner.exited is not None:
            parts.append((rows[self.tokens.shape[0] :], self.inner.exited.tokens))
        whole = [
            gather_from_sequence_parallel_region(own.contiguous(), group=self.group)[
                : tokens.shape[0]
            ]
            for own, tokens in parts
        ]
        return whole[0] if len(whole) == 1 else torch.cat(whole)


def _share(tokens: Tokens, group: ProcessGroup, multiple: int) -> Tokens:
    """This rank's contiguous part; filled up with padding at the end."""
    extra = -len(tokens.positions) % multiple

    def own(values: Tensor | None, fill: int = 0) -> Tensor | None:
        if values is None:
            return None
        rest = values.new_full((extra, *values.shape[1:]), fill)
        return torch.cat([values, rest]).chunk(group.size())[group.rank()]

    is_padding = tokens.is_padding
    if is_padding is None and extra:
        is_padding = torch.zeros_like(tokens.positions, dtype=torch.bool)
    positions = own(tokens.positions)
    assert positions is not None
    return Tokens(
        positions,
        tokens.sequence_length,
        documents=own(tokens.documents),
        is_padding=own(is_padding, fill=True),
        padding_trails=False,
    )
