"""What layers do to each row between their matrix products, in one pass over memory each.

Legend: `n` heads, `d` head size, `h` hidden size, `f` width of an MLP.
"""

from ctypes import c_float, c_int64, c_void_p

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mor_layers.cpu_kernels.build import kernel
from mor_layers.cpu_kernels.capability import FORMATS, applies


def swiglu(gate: Float[Tensor, "... f"], up: Float[Tensor, "... f"]) -> Float[Tensor, "... f"]:
    """`silu(gate) * up` (Shazeer 2020, arXiv 2002.05202)."""
    strides = [_row_stride(values, 1) for values in (gate, up)] if applies(gate, up) else [None]
    if None in strides or gate.shape != up.shape:
        return F.silu(gate) * up
    out = _like(gate)
    run = kernel("mor_swiglu", c_int64, *[c_void_p] * 3, *[c_int64] * 5)
    size = gate.shape[-1]
    at = gate.data_ptr(), up.data_ptr(), out.data_ptr()
    run(FORMATS[gate.dtype], *at, out.numel() // size, size, *strides, torch.get_num_threads())
    return out


def rotate(
    heads: Float[Tensor, "... n d"], cos: Float[Tensor, "... 1 d"], sin: Float[Tensor, "... 1 d"]
) -> Float[Tensor, "... n d"]:
    """`heads * cos + halves * sin`, where `halves` are the heads with their halves exchanged."""
    stride = _row_stride(heads, 2) if applies(heads, cos, sin) else None
    if (
        stride is None
        or not (cos.is_contiguous() and sin.is_contiguous())
        or cos.shape[:-2] != heads.shape[:-2]
    ):
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat([second, first], dim=-1) * sin
    out = _like(heads)
    run = kernel("mor_rotate", c_int64, *[c_void_p] * 4, *[c_int64] * 5)
    num_heads, size = heads.shape[-2:]
    at = heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr()
    sizes = out.numel() // (num_heads * size), num_heads, size, stride
    run(FORMATS[heads.dtype], *at, *sizes, torch.get_num_threads())
    return out


def rms_norm(
    hidden: Float[Tensor, "... h"], weight: Tensor, epsilon: float
) -> Float[Tensor, "... h"]:
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), computed in single precision.

    Args:
        weight: `[h]`, or one for each row.
    """
    stride = _row_stride(hidden, 1) if applies(hidden, weight) else None
    if stride is None or weight.dim() > 1:
        normed = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=epsilon)
        return normed.to(hidden) * weight
    out = _like(hidden)
    run = kernel("mor_rms_norm", c_int64, *[c_void_p] * 3, *[c_int64] * 4, c_float)
    size = hidden.shape[-1]
    at = hidden.data_ptr(), weight.data_ptr(), out.data_ptr()
    sizes = out.numel() // size, size, stride
    run(FORMATS[hidden.dtype], *at, *sizes, torch.get_num_threads(), epsilon)
    return out


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _row_stride(tensor: Tensor, num_inner: int) -> int | None:
    """From one row to the next; None if rows are not evenly spaced, or not in one piece each.

    Args:
        num_inner: dimensions of a row.
    """
    sizes, strides = tensor.shape, tensor.stride()
    expected = 1
    for size, stride in zip(
        sizes[: -num_inner - 1 : -1], strides[: -num_inner - 1 : -1], strict=True
    ):
        if size != 1 and stride != expected:
            return None
        expected *= size
    found = None
    for size, stride in zip(
        sizes[-num_inner - 1 :: -1], strides[-num_inner - 1 :: -1], strict=True
    ):
        if size == 1:
            continue
        if found is None:
            found = expected = stride
        if stride != expected:
            return None
        expected *= size
    return tensor.shape[-1] if found is None else found
