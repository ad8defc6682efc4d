"""Reads weights that were stored in FP8 with a scale for each block, as DeepSeek-V3 is released.

A matrix of 8-bit floats comes with one of scales: `name.weight` with `name.weight_scale_inv`, one scale
for each block of 128 · 128 numbers (arXiv 2412.19437, section 3.3). Their product is the weight, which
is rounded to bfloat16, as in DeepSeek's own conversion. What is written afterwards has no blocks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mor_layers.settings.field_types import shown
from mor_layers.weights import LazyTensors

_SCALE = "_scale_inv"
_SUPPORTED = {"quant_method": "fp8", "fmt": "e4m3"}


def without_fp8(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any], where: str
) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint, those in FP8 as bfloat16.

    Args:
        values: the checkpoint's config.json; without `quantization_config`, nothing changes.
        where: its place, for error messages.

    Raises:
        ValueError: the weights are quantized in another way. When a tensor is read: its scales do not
            fit it, or it has none.
    """
    given = values.get("quantization_config")
    if given is None:
        return tensors
    rows, columns = _block_size(given, where)

    def read(name: str) -> Tensor:
        tensor, scales = tensors[name], f"{name}{_SCALE}"
        if scales in tensors:
            return _scaled(tensor, tensors[scales], rows, columns, name)
        if tensor.dtype == torch.float8_e4m3fn:
            raise ValueError(f"{where}: {name!r} is in FP8, but {scales!r} is missing.")
        return tensor

    return LazyTensors([name for name in tensors if not name.endswith(_SCALE)], read)


def _block_size(given: object, where: str) -> tuple[int, int]:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: quantization_config={shown(given)}: expected a mapping.")
    for name, only in _SUPPORTED.items():
        if given.get(name) != only:
            raise ValueError(
                f"{where}: quantization_config.{name}={shown(given.get(name))} is not supported, only "
                f"{only!r}. Use the original weights."
            )
    size = given.get("weight_block_size")
    if not (
        isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    ):
        raise ValueError(
            f"{where}: quantization_config.weight_block_size={shown(size)} must be two positive "
            "integers, such as [128, 128]."
        )
    return size[0], size[1]


def _scaled(
    weight: Float[Tensor, "o i"], scales: Float[Tensor, "p q"], rows: int, columns: int, name: str
) -> Float[Tensor, "o i"]:
    """Each block of the weight, times its scale. The last blocks of a row or column may be cut."""
    expected = tuple(
        -(-size // block) for size, block in zip(weight.shape, (rows, columns), strict=False)
    )
    if weight.dim() != 2 or tuple(scales.shape) != expected:
        raise ValueError(
            f"{name!r} has shape {tuple(weight.shape)}, and scales of shape {tuple(scales.shape)} for "
            f"blocks of {rows} · {columns}."
        )
    # One row of blocks after another, so that no second matrix in fp32 is needed.
    parts = []
    for part, own in zip(weight.split(rows), scales.float(), strict=True):
        each = own.repeat_interleave(columns)[: weight.shape[1]]
        parts.append((part.float() * each).to(torch.bfloat16))
    return torch.cat(parts)
