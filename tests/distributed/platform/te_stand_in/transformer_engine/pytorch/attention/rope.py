"""The fused rotary embedding, with the kernel's view of its table."""

from typing import Any

import torch
from torch import Tensor

from transformer_engine import calls
from transformer_engine.signatures import recorded

_SIGNATURE = recorded("apply_rotary_pos_emb")


def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> Tensor:
    """`[s b n d]`: row `i` of every sequence by row `i` of the table `[s2 1 1 r]`."""
    given = _SIGNATURE.bind(*args, **kwargs).arguments
    t, freqs = given["t"], given["freqs"]
    if given.get("tensor_format") != "sbhd" or given.get("fused") is not True:
        raise NotImplementedError("the stand-in has the fused kernel for sbhd")
    if given.get("interleaved") or given.get("start_positions") is not None:
        raise NotImplementedError("neither interleaved, nor with start_positions")
    assert freqs.dtype == torch.float32
    assert freqs.ndim == 4, f"{freqs.shape=}"
    assert freqs.shape[1:3] == (1, 1), f"{freqs.shape=}: one table for all sequences and heads"
    assert freqs.shape[0] >= t.shape[0], f"{freqs.shape=} for {t.shape=}"
    assert freqs.shape[3] <= t.shape[3], f"{freqs.shape=} for {t.shape=}"
    calls.rotations.append((tuple(t.shape), tuple(freqs.shape)))
    angles, size = freqs[: len(t)], freqs.shape[3]
    x, rest = t[..., :size].float(), t[..., size:]
    first, second = x.chunk(2, dim=-1)
    turned = x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
    return torch.cat([turned.type_as(t), rest], dim=-1)
