"""Finds the documents that a causal attention mask separates.

Legend: `b` batch, `s` sequence.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Documents = tuple[Tensor | None, int | None]

# Every layer of a model gets the same mask, so the result is cached together with the version of the
# mask. A changed version shows that the mask was modified in place.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def documents_of(is_barred: Tensor) -> Documents:
    """Document numbers `[s b]` of a causal mask `[b 1 s s]`, and the largest number per sequence.

    Both are None if each sequence is one document. Reading a mask synchronizes with the device. This
    happens once per mask, in the first layer that asks.

    Raises:
        ValueError: the mask is not causal attention within consecutive documents.
    """
    if is_barred.is_inference():  # inference tensors have no version counter
        return _read(is_barred)
    known = _known.get(is_barred)
    if known is None or known[0] != is_barred._version:
        known = is_barred._version, _read(is_barred)
        _known[is_barred] = known
    return known[1]


def _read(is_barred: Tensor) -> Documents:
    barred = is_barred[:, 0]
    begins = barred.diagonal(offset=-1, dim1=1, dim2=2)  # token t cannot see t-1
    documents = torch.cat([torch.zeros_like(begins[:, :1]), begins], dim=1).cumsum(dim=1)
    same = documents[:, :, None] == documents[:, None, :]
    expected = same.logical_not() | torch.ones_like(barred).triu(1)
    last, is_other = torch.stack([documents.max(), (barred != expected).any()]).tolist()
    if is_other:
        raise ValueError(
            "attention_mask is not causal attention within consecutive documents, the only masks "
            "that a recursion supports. Pass None, or the mask of reset_attention_mask=True."
        )
    return (documents.T, last + 1) if last else (None, None)
