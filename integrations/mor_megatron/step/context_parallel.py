"""Context parallelism without Transformer Engine.

Outside a recursion, each rank holds two of `2 · cp` chunks of the sequence, numbers `rank` and
`2 · cp - 1 - rank`. This is Megatron's zigzag order. In a packed sequence, each document is split in
this way. Inside a recursion, the rows of a step are in sequence order and split evenly and
contiguously, so that every rank has the same amount of work regardless of which tokens were selected.
Attention all-gathers keys and values over the group and masks them by position, which is exact. Queries
are never sent.

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
from mor_megatron.step.packed_input import PackedDocuments


def zigzag_positions(
    length: int,
    size: int,
    device: torch.device | None = None,
    packed: PackedDocuments | None = None,
) -> Tensor:
    """Position of each row `[size n]` of a sequence that is split over `size` ranks in zigzag order.

    Args:
        packed: the documents of a packed sequence, each of which is split by itself.

    Raises:
        ValueError: the length, or that of a document with its padding, is not a multiple of
            `2 * size`.
    """
    if packed is not None:
        return _zigzag_positions_of(packed, size)
    if length % (2 * size):
        raise ValueError(
            f"a sequence of {length} tokens cannot be split into {2 * size} equal chunks, two for "
            f"each of {size} context-parallel ranks. Use a multiple of {2 * size}."
        )
    chunks = torch.arange(length, device=device).view(2, size, -1)
    return torch.cat([chunks[0], chunks[1].flip(0)], dim=1)  # chunk r, then chunk 2·size-1-r


def _zigzag_positions_of(packed: PackedDocuments, size: int) -> Tensor:
    if (packed.lengths % (2 * size)).any():
        raise ValueError(
            f"a document cannot be split into {2 * size} equal chunks, two for each of {size} "
            f"context-parallel ranks. Pad each document to a multiple of {2 * size} tokens, and pass "
            "its length without and with padding as cu_seqlens_q and cu_seqlens_q_padded."
        )
    chunk = packed.offsets * (2 * size) // packed.lengths
    rank = torch.minimum(chunk, 2 * size - 1 - chunk)
    return rank.argsort(stable=True).view(size, -1)


def in_sequence_order(
    rows: Tensor, group: ProcessGroup, packed: PackedDocuments | None = None
) -> Tensor:
    """Gather the zigzag rows `[n ...]` of all ranks as one sequence `[s ...]`. Differentiable."""
    whole = gather_from_sequence_parallel_region(rows.contiguous(), group=group)
    positions = zigzag_positions(len(whole), group.size(), rows.device, packed).flatten()
    return whole.index_select(0, positions.argsort())


class Relayout:
    """Converts rows between zigzag and contiguous order, over the ranks of a group.

    Args:
        positions: position of each row of each context-parallel rank, see `zigzag_positions`. On the
            host, where the ranks' shares are counted.
        group: the context-parallel ranks. With sequence parallelism also the tensor-parallel ranks,
            which split the rows of a context-parallel rank contiguously.
        device: where the rows are.
    """

    def __init__(self, positions: Tensor, group: ProcessGroup, device: torch.device) -> None:
        self.group = group
        positions = positions.reshape(group.size(), -1)
        size = positions.shape[1]
        target = positions // size  # [rank n]: the rank that each row is sent to
        own = target[group.rank()]
        self._leaving = own.argsort(stable=True).to(device)
        self._sent = own.bincount(minlength=group.size()).tolist()
        arriving = positions[target == group.rank()]  # ordered by sender, then in its row order
        self._order = arriving.argsort().to(device)
        self._received = (target == group.rank()).sum(dim=1).tolist()

    def to_sequence(self, rows: Tensor) -> Tensor:
        """Convert rows `[n ...]` from zigzag to contiguous order."""
        leaving = rows.index_select(0, self._leaving)
        return all_to_all(self.group, leaving, self._received, self._sent).index_select(
            0, self._order
        )

    def to_zigzag(self, rows: Tensor) -> Tensor:
        """Convert rows `[n ...]` from contiguous to zigzag order."""
        leaving = rows.index_select(0, self._order.argsort())
        arrived = all_to_all(self.group, leaving, self._sent, self._received)
        return arrived.index_select(0, self._leaving.argsort())


@dataclass(frozen=True)
class GatheredStep(StepContext):
    """The context of a step whose tokens are split over ranks. Each rank sees the keys of all."""

    inner: StepContext
    """The context of the whole step."""
    group: ProcessGroup
    """The context-parallel ranks."""
    multiple: int
    """The rows of the step are padded to a multiple of this."""

    @classmethod
    def of(cls, inner: StepContext, group: ProcessGroup, multiple: int) -> "GatheredStep":
        """This rank's part of a step."""
        tokens = _share(inner.tokens, group, multiple)
        return cls(inner.step, tokens, inner, group, multiple, experts=inner.experts)

    @property
    def projects_keys(self) -> bool:
        return self.inner.projects_keys

    @property
    def key_positions(self) -> Tensor:
        return self.inner.key_positions

    @cached_property
    def exited(self) -> Exited | None:  # type: ignore[override]
        whole = self.inner.exited
        if whole is None:
            return None
        return Exited(_share(whole.tokens, self.group, self.multiple), whole.hidden)

    def exchange(
        self, layer: int, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[m b g d]` of all ranks, as the whole step sees them."""
        if key is None or value is None:
            return self.inner.exchange(layer, None, None)
        return self.inner.exchange(layer, self._gather(key), self._gather(value))

    @cached_property
    def causal_mask(self) -> Tensor:
        """The mask `[b 1 k m]`. Padding rows see all keys, because an empty row would give NaN."""
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
    """This rank's contiguous part of the tokens, after padding them to `multiple` at the end."""
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
