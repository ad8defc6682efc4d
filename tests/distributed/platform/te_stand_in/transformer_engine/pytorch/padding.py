"""Rows of each expert filled up to what a recipe asks for, and back."""

from typing import Any

import torch
from torch import Tensor, nn

from transformer_engine.common.recipe import MXFP8BlockScaling, NVFP4BlockScaling
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
from transformer_engine.signatures import bound


def _filled(count: int) -> int:
    is_block = isinstance(FP8GlobalStateManager.recipe, MXFP8BlockScaling | NVFP4BlockScaling)
    return count + -count % (32 if is_block else 16)


class Fp8Padding(nn.Module):
    @bound("Fp8Padding.__init__")
    def __init__(self, given: dict[str, Any]) -> None:
        nn.Module.__init__(self)

    @bound("Fp8Padding.forward")
    def forward(self, given: dict[str, Any]) -> tuple[Tensor, list[int]]:
        splits = [int(count) for count in given["m_splits"]]
        parts = []
        for rows in given["inp"].split(splits):
            parts += [rows, rows.new_zeros(_filled(len(rows)) - len(rows), rows.shape[1])]
        return torch.cat(parts), [_filled(count) for count in splits]


class Fp8Unpadding(nn.Module):
    @bound("Fp8Unpadding.__init__")
    def __init__(self, given: dict[str, Any]) -> None:
        nn.Module.__init__(self)

    @bound("Fp8Unpadding.forward")
    def forward(self, given: dict[str, Any]) -> Tensor:
        splits = [int(count) for count in given["m_splits"]]
        parts = given["inp"].split([_filled(count) for count in splits])
        return torch.cat([rows[:count] for rows, count in zip(parts, splits, strict=True)])
