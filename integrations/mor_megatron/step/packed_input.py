"""The documents of a batch that is packed into one sequence, in Megatron's `thd` format.

Sequences of different lengths, as in supervised fine-tuning, are put one after another into one row of
tokens, and a `PackedSeqParams` says where they begin. Each is a document: tokens attend and route within
it, and rotary positions restart with it. The same information makes the rows of a step's documents (see
`packing`), which are fewer.

Legend: `s` tokens of all documents together, with the padding between them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class PackedDocuments:
    """Which document each token of a packed sequence belongs to."""

    documents: Tensor
    """Number of each token's document, `[s]`."""
    offsets: Tensor
    """Position of each token in its document, `[s]`."""
    lengths: Tensor
    """Length of each token's document with its padding, `[s]`."""
    is_padding: Tensor | None
    """True at the padding that documents end with, `[s]`; None if there is none."""
    count: int
    """Upper bound on the number of documents, known on the host."""
    longest: int
    """Tokens of the longest document, without padding."""

    @cached_property
    def is_visible(self) -> Tensor:
        """`[1 1 s s]`, True where a token (row) may see another (column) under causal attention.

        Padding sees itself, because an empty row of the softmax would give NaN.
        """
        visible = (self.documents[:, None] == self.documents).tril()
        if self.is_padding is not None:
            own = torch.eye(len(visible), dtype=torch.bool, device=visible.device)
            visible = visible & ~self.is_padding | own
        return visible[None, None]


# Every layer gets the same parameters, so the result is kept with the tensors' versions. A changed
# version shows that a tensor was modified in place, as the buffers of captured graphs are.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def packed_documents(packed: PackedSeqParams, length: int, batch: int = 1) -> PackedDocuments:
    """The documents of a packed sequence of `length` tokens.

    Tokens after the last document are padding. Reading the boundaries synchronizes with the device. This
    happens once per batch, in the first layer that asks.

    Args:
        batch: sequences of the tensors that the boundaries are for.

    Raises:
        ValueError: the boundaries are not those of causal self-attention within documents of one
            packed sequence.
    """
    _require_supported(packed, batch)
    given = [t for t in (packed.cu_seqlens_q, packed.cu_seqlens_q_padded) if t is not None]
    if any(t.is_inference() for t in given):  # inference tensors have no version counter
        return _read(packed, length)
    key = (length, *((id(t), t._version) for t in given))
    known = _known.get(packed)
    if known is None or known[0] != key:
        known = key, _read(packed, length)
        _known[packed] = known
    return known[1]


def require_no_mask(attention_mask: Tensor | None) -> None:
    """Raise ValueError if a mask is given beside packed documents."""
    if attention_mask is not None:
        raise ValueError(
            "packed_seq_params already say which tokens attend to one another, and attention_mask would "
            "have no effect. Pass attention_mask=None (create_attention_mask=False in GPTDatasetConfig)."
        )


def _require_supported(packed: Any, batch: int) -> None:
    advice = "Merge the boundaries of a micro-batch into one row of tokens, as Megatron does."
    rules = [
        (packed.qkv_format != "thd", f"qkv_format={packed.qkv_format!r}", "Use 'thd'."),
        (batch != 1, f"{batch} sequences of tokens", advice),
        (
            packed.local_cp_size is not None or packed.cp_group is not None,
            "local_cp_size or cp_group (hybrid context parallelism)",
            "The ranks that share a recursion's tokens cannot change between batches. Leave them out.",
        ),
        (
            packed.cu_seqlens_q is None or packed.cu_seqlens_q.dim() != 1,
            "cu_seqlens_q that is no vector",
            advice,
        ),
    ]
    for is_wrong, given, fix in rules:
        if is_wrong:
            raise ValueError(
                f"packed_seq_params with {given} cannot be used with this layer. {fix}"
            )


def _read(packed: Any, length: int) -> PackedDocuments:
    own, padded = packed.cu_seqlens_q, packed.cu_seqlens_q_padded
    borders = own if padded is None else padded
    if borders.shape != own.shape:
        raise ValueError(
            f"cu_seqlens_q has {len(own)} entries and cu_seqlens_q_padded {len(borders)}. Both begin "
            "with 0 and have one entry for the end of each document."
        )
    # What follows the last document is one more, of padding.
    sizes = F.pad(own.long().diff(), (0, 1))
    borders = F.pad(borders.long(), (0, 1), value=length)
    positions = torch.arange(length, device=borders.device)
    documents = torch.searchsorted(borders[:-1], positions, right=True) - 1
    offsets, lengths = positions - borders[documents], borders.diff()
    is_padding = offsets >= sizes[documents]
    is_wrong = (borders[0] != 0) | (sizes < 0).any() | (lengths < sizes).any()
    for keys, queries in ((packed.cu_seqlens_kv, own), (packed.cu_seqlens_kv_padded, padded)):
        if keys is not None and keys is not queries:
            is_same = queries is not None and keys.shape == queries.shape
            is_wrong = is_wrong | (keys != queries).any() if is_same else torch.ones_like(is_wrong)
    wrong, has_padding, longest = torch.stack([is_wrong, is_padding.any(), sizes.max()]).tolist()
    if wrong:
        raise ValueError(
            f"packed_seq_params do not describe self-attention within documents of {length} tokens: "
            "cu_seqlens_q must begin with 0, not decrease, and not exceed the tokens, and the other "
            "boundaries must agree with it."
        )
    return PackedDocuments(
        documents,
        offsets,
        lengths[documents],
        is_padding if has_padding else None,
        count=len(borders) - 1,
        longest=longest,
    )
