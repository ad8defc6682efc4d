"""Which token each row holds, and taking rows out and putting them back.

Legend: `b` batch, `s` sequence, `n` candidates of a step, `k` tokens that run it, `h` hidden.
Tensors are sequence first, as in Megatron and in `torch.nn.Transformer*`.

Selections of unequal length share one rectangle. A sequence with fewer selected tokens than the
widest one is filled with padding slots at its end. A padding slot holds an unselected candidate, is
never written back, and comes after every real token, so plain causal attention never sees it.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Which token of the sequence each row of a `[k b ...]` tensor holds.

    `is_padding=None` means that no row is padding, and `documents=None` that each sequence is one
    document. Both are known on the host, so that the common case needs no mask.
    """

    positions: Int[Tensor, "k b"]
    """Position in the sequence, ascending among the rows that are not padding."""
    sequence_length: int
    """Length `s` of the whole sequence that the positions refer to."""
    documents: Int[Tensor, "k b"] | None = None
    """Number of the document that each token belongs to."""
    is_padding: Bool[Tensor, "k b"] | None = None
    """True in rows that hold no token."""
    document_lengths: Int[Tensor, "k b"] | None = None
    """Length of each token's document in the whole sequence; None if `is_plain`."""
    padding_trails: bool = True
    """Whether padding rows come after all others, which makes plain causal attention exact."""

    @classmethod
    def whole_sequence(
        cls,
        length: int,
        batch: int,
        device: torch.device | str | None = None,
        documents: Int[Tensor, "s b"] | None = None,
        is_padding: Bool[Tensor, "s b"] | None = None,
    ) -> "Tokens":
        """Every token of `batch` sequences, in order.

        Args:
            documents: any numbers that change at the start of a new document.
            is_padding: True where the sequence holds no token.

        Raises:
            ValueError: `documents` or `is_padding` is not `[length, batch]`.
        """
        for name, given in (("documents", documents), ("is_padding", is_padding)):
            if given is not None and given.shape != (length, batch):
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}; expected [s b] = "
                    f"({length}, {batch}), sequence first."
                )
        positions = torch.arange(length, device=device)[:, None].expand(length, batch)
        if documents is None and is_padding is None:
            return cls(positions, length)
        if documents is not None:  # renumbered 0, 1, ... along the sequence
            begins = torch.zeros_like(documents, dtype=torch.bool)
            begins[1:] = documents[1:] != documents[:-1]
            documents = begins.cumsum(dim=0)
        group = torch.zeros_like(positions) if documents is None else documents
        counted = torch.ones_like(positions) if is_padding is None else (~is_padding).long()
        lengths = torch.zeros_like(positions).scatter_add(0, group, counted).gather(0, group)
        return cls(positions, length, documents, is_padding, lengths, is_padding is None)

    @property
    def shape(self) -> torch.Size:
        """`(k, b)`."""
        return self.positions.shape

    @property
    def is_plain(self) -> bool:
        """Whether there is neither padding nor more than one document."""
        return self.documents is None and self.is_padding is None

    @property
    def counted(self) -> Float[Tensor, "k b"] | None:
        """1 for tokens and 0 for padding; None if there is no padding."""
        return None if self.is_padding is None else self.is_padding.logical_not().float()

    @property
    def count(self) -> Float[Tensor, ""]:
        """Number of rows that hold a token."""
        if self.counted is not None:
            return self.counted.sum()
        return torch.full((), float(self.positions.numel()), device=self.positions.device)

    def repeated(self, times: int) -> "Tokens":
        """The tokens of a batch that holds all sequences `times` times, one after another."""
        named = ("positions", "documents", "is_padding", "document_lengths")
        given = {name: getattr(self, name) for name in named}
        return replace(self, **{n: v.repeat(1, times) for n, v in given.items() if v is not None})

    def rows_of(self, among: "Tokens") -> Int[Tensor, "k b"]:
        """The row of each of some of these tokens, which `among` holds."""
        row = torch.arange(len(self.positions), device=self.positions.device)
        row_of = row.new_zeros(self.sequence_length, self.shape[1])
        row = row[:, None].expand_as(self.positions)
        return row_of.scatter(0, self.positions, row).gather(0, among.positions)

    def take(self, rows: Int[Tensor, "k b"], is_padding: Bool[Tensor, "k b"] | None) -> "Tokens":
        """The tokens of the given rows; `is_padding` marks those that are padding slots."""
        return Tokens(
            positions=self.positions.gather(0, rows),
            sequence_length=self.sequence_length,
            documents=None if self.documents is None else self.documents.gather(0, rows),
            is_padding=is_padding,
            document_lengths=(
                None if self.document_lengths is None else self.document_lengths.gather(0, rows)
            ),
        )


def take_rows(values: Float[Tensor, "n b h"], rows: Int[Tensor, "k b"]) -> Float[Tensor, "k b h"]:
    """Rows of each sequence: `out[i, j] = values[rows[i, j], j]`.

    Rows must not repeat in a sequence, unless nobody uses their gradient.
    """
    return _TakeRows.apply(values.flatten(0, 1), _flat(rows)).unflatten(0, rows.shape)  # type: ignore[union-attr]


class _TakeRows(torch.autograd.Function):
    """`index_select` of rows that do not repeat.

    Its own backward pass adds rows up, on a GPU by atomic additions in any order. As no row repeats,
    each gradient can be copied to its place instead, which takes no atomics and is deterministic.
    """

    @staticmethod
    def forward(values: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        return values.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # type: ignore[override]
        values, index = inputs
        ctx.save_for_backward(index)
        ctx.shape = values.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).index_copy_(0, index, gradient), None


def put_rows(
    values: Float[Tensor, "n b h"], updated: Float[Tensor, "k b h"], rows: Int[Tensor, "k b"]
) -> Float[Tensor, "n b h"]:
    """`values` with `values[rows[i, j], j] = updated[i, j]`; rows must not repeat in a sequence."""
    flat = values.flatten(0, 1).index_copy(0, _flat(rows), updated.flatten(0, 1))
    return flat.unflatten(0, values.shape[:2])


def _flat(rows: Int[Tensor, "k b"]) -> Int[Tensor, " kb"]:
    batch = rows.shape[1]
    return (rows * batch + torch.arange(batch, device=rows.device)).flatten()
