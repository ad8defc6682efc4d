"""FP8 and FP4 in a recursion: divisible numbers of rows, and one precision for shared weights.

Written against the sources of Transformer Engine 2.20 and Megatron-Core 0.19.2; it has not been run
on a GPU. `TransformerBlock` enters Megatron's quantization context around a RecursionLayer as it
does around any layer, with the number of its first unrolled layer, so the quantization recipe
applies to the shared layers unchanged.

Legend: `k` rows of a step, `b` batch, `h` hidden.
"""

import math

import torch.nn.functional as F
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer import TransformerConfig
from torch import Tensor


def row_alignment(config: TransformerConfig) -> int:
    """Number that the rows (`k · b`) of a quantized matrix product must be a multiple of.

    A step may select any number of tokens, but Transformer Engine refuses numbers that its kernels
    cannot divide into blocks.
    """
    if config.fp4 or (config.fp8 and config.fp8_recipe == Fp8Recipe.mxfp8):
        return 32
    return 16 if config.fp8 else 1


def filled(rows: Tensor, alignment: int) -> Tensor:
    """`[k b h]` with as few zero rows appended as make `k · b` a multiple of `alignment`."""
    missing = -len(rows) % (alignment // math.gcd(alignment, rows.shape[1]))
    return F.pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows


def require_one_precision(config: TransformerConfig, first: int, count: int) -> None:
    """Raise ValueError if only some layers of a recursion are kept in bf16 by
    `first_last_layers_bf16`; their weights are shared with layers that are quantized.

    The recursion covers the unrolled layers `first` to `first + count - 1` (0-based). Megatron
    enters one quantization context around all of them, chosen by the first: the others would
    silently get that layer's precision.
    """
    if not (config.fp8 or config.fp4) or (config.fp8 and config.fp8_recipe == Fp8Recipe.delayed):
        return  # delayed scaling is refused in `validation`
    kept = [n for n in range(first, first + count) if is_first_last_bf16_layer(config, n)]
    if kept:
        raise ValueError(
            f"num_layers_at_start_in_bf16={config.num_layers_at_start_in_bf16} and "
            f"num_layers_at_end_in_bf16={config.num_layers_at_end_in_bf16} reach into a recursion "
            f"over unrolled layers {first + 1} to {first + count} of {config.num_layers}, whose "
            f"layers share weights and so have one precision. Use at most {first} at the start and "
            f"{config.num_layers - first - count} at the end, or first_last_layers_bf16=False."
        )
