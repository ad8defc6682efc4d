"""What was asked of the stand-in since `clear`."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Attention:
    """One call of `DotProductAttention.forward`."""

    layer_number: int
    qkv_format: str
    attn_mask_type: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    mask: tuple[int, ...] | None
    cu_seqlens: torch.Tensor | None
    backend: str
    """`fused`: FlashAttention or cuDNN may take it. `unfused`: only the implementation may that
    materialises all scores."""


attention: list[Attention] = []
recipes: list[Any] = []
"""The recipe of each quantization context entered; None where it was entered disabled."""
quantized_rows: list[int] = []
"""Rows of each matrix product under such a context."""
rotations: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
"""Shapes of what the fused rotary embedding turned, and of its tables."""


def clear() -> None:
    attention.clear()
    recipes.clear()
    quantized_rows.clear()
    rotations.clear()
