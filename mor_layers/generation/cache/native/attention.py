"""PagedAttention: tokens read their lists of rows in place, by the compiled kernel.

Legend: `t` tokens, `n` query heads, `d` head size.
"""

import ctypes
import math
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from mor_layers.generation.cache.memory import KVArena
from mor_layers.generation.cache.native.build import library
from mor_layers.generation.cache.policies import Visible

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, "int8": 2, "fp8": 3}
"""As the kernel counts them."""


class PagedAttention:
    """Every token reads its own list of rows in place; adjacent tokens of a list share what they read.

    Scores, weights and sums are computed in single precision, whatever the precision of the rows.

    Args:
        visible: the rows that each token sees. A token that sees none gets zeros.
    """

    def __init__(self, visible: Visible) -> None:
        self.table = visible.table
        self.lists, self.counts = visible.lists.contiguous(), visible.counts.contiguous()
        assert self.table.stride(1) == 1, "the kernel reads each list from one piece of memory"

    def __call__(
        self, arena: KVArena, layer: int, query: Float[Tensor, "t n d"]
    ) -> Float[Tensor, "t n d"]:
        data, scales = arena.data[layer], None if arena.scales is None else arena.scales[layer]
        query, dtype = query.float().contiguous(), query.dtype
        out = torch.empty_like(query)
        _kernel()(
            *(_address(tensor) for tensor in (query, out, data, scales)),
            *(_address(tensor) for tensor in (self.table, self.lists, self.counts)),
            *query.shape[:2],
            self.table.stride(0),
            *data.shape[1:],
            _format(arena),
            torch.get_num_threads(),
            1.0 / math.sqrt(query.shape[-1]),
        )
        return out.to(dtype)


def attends_natively(arena: KVArena) -> bool:
    """Whether the kernel reads an arena: it is on a CPU, in a format that the kernel knows, and there
    is a compiler."""
    return arena.data.device.type == "cpu" and _format(arena) is not None and library() is not None


def _format(arena: KVArena) -> int | None:
    # Sums in single precision would be too coarse for an arena of double precision.
    if arena.dtype not in (torch.float32, torch.bfloat16):
        return None
    return _FORMATS[arena.eight_bits or arena.data.dtype]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _kernel() -> Callable[..., None]:
    compiled = library()
    assert compiled is not None
    kernel = compiled.paged_attention
    pointers, sizes = [ctypes.c_void_p] * 7, [ctypes.c_int64] * 8
    kernel.argtypes, kernel.restype = [*pointers, *sizes, ctypes.c_float], None
    return kernel
