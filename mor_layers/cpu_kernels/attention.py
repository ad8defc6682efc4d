"""Attention to rows of a paged cache, which are read in place.

Legend: `t` tokens, `n` query heads, `g` key-value heads, `d` head size, `r` rows of the cache,
`p` vectors of a head in a row, `l` lists of up to `m` rows.
"""

import math
from ctypes import c_float, c_int64, c_void_p

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mor_layers.cpu_kernels.build import kernel, library
from mor_layers.cpu_kernels.capability import FORMATS, are_kernels_allowed


def attends_to(data: Tensor, dtype: torch.dtype) -> bool:
    """Whether `paged_attention` reads a cache: it is on a CPU, and there is a C++ compiler.

    Args:
        dtype: of the numbers before they were stored. Sums would be too coarse for double precision.
    """
    is_known = data.dtype in FORMATS and dtype in (torch.float32, torch.bfloat16)
    return (
        is_known and data.device.type == "cpu" and are_kernels_allowed() and library() is not None
    )


def paged_attention(
    query: Float[Tensor, "t n d"],
    data: Tensor,
    scales: Float[Tensor, "r p g"] | None,
    table: Int[Tensor, "l m"],
    lists: Int[Tensor, " t"],
    counts: Int[Tensor, " t"],
) -> Float[Tensor, "t n d"]:
    """Attention of each token to the first `counts` rows of its list; zeros where these are none.

    Scores, weights and sums are computed in single precision. Adjacent tokens of a list share what they
    read.

    Args:
        data: `[r p g d]`: a key and a value of each head, or one vector that is both (p = 1).
        scales: what the numbers of a head are to be multiplied by.
        table: the rows of each list.
    """
    assert table.stride(1) == lists.stride(0) == counts.stride(0) == 1
    values = query.float().contiguous()
    out = torch.empty_like(values)
    run = kernel("mor_paged_attention", c_int64, *[c_void_p] * 7, *[c_int64] * 7, c_float)
    given = (values, out, data, scales, table, lists, counts)
    run(
        FORMATS[data.dtype],
        *(None if tensor is None else tensor.data_ptr() for tensor in given),
        *query.shape[:2],
        table.stride(0),
        *data.shape[1:],
        torch.get_num_threads(),
        1.0 / math.sqrt(query.shape[-1]),
    )
    return out.to(query.dtype)
