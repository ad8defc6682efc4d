"""Which documents a mask keeps apart: read once a mask, and anew where it changed."""

import pytest
import torch

from mor_megatron.step import documents, documents_of


def mask_of(numbers: list[int]) -> torch.Tensor:
    """`[1 1 s s]`, True where attention is barred."""
    row = torch.tensor(numbers)
    barred = row[:, None] != row[None]
    return (barred | torch.ones_like(barred).triu(1))[None, None]


def test_documents_are_numbered_and_the_most_of_a_sequence_counted():
    masks = torch.cat([mask_of([0, 0, 1, 1, 2]), mask_of([7, 8, 8, 8, 8])])
    numbers, most = documents_of(masks)
    assert numbers.T.tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]]
    assert most == 3
    assert documents_of(mask_of([4, 4, 4])) == (None, None)


def test_a_mask_is_read_once_until_it_changes(monkeypatch):
    reads = []
    read = documents._read
    monkeypatch.setattr(documents, "_read", lambda mask: reads.append(1) or read(mask))
    mask = mask_of([0, 0, 1, 1])
    first = documents_of(mask)
    assert documents_of(mask) is first
    assert len(reads) == 1
    mask.copy_(mask_of([0, 1, 1, 1]))
    numbers, _ = documents_of(mask)
    assert numbers.T.tolist() == [[0, 1, 1, 1]]
    assert len(reads) == 2
    with torch.inference_mode():  # such tensors do not tell whether they changed
        fresh = mask_of([0, 1])
        documents_of(fresh)
        documents_of(fresh)
    assert len(reads) == 4


def test_other_masks_are_refused():
    mask = mask_of([0, 0, 0])
    mask[..., 2, 0] = True
    with pytest.raises(ValueError, match="not causal attention within consecutive documents"):
        documents_of(mask)
