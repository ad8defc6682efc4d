"""What FP8 and FP4 ask of a recursion: rows that divide, and one precision for shared weights.

Read against Transformer Engine 2.20 and Megatron-Core 0.19.2; no GPU has run it. `TransformerBlock`
enters Megatron's quantization context around a RecursionLayer as around any layer, with the number of
its first unrolled layer, so the recipe reaches the shared layers as it is.

Legend: `k` rows of a step, `b` batch, `h` hidden.
"""

import math

import torch.nn.functional as F
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer import TransformerConfig
from torch import Tensor


def row_alignment(config: TransformerConfig) -> int:
    """Rows (`k · b`) of a quantized matrix product come in multiples of this.

    Of a sequence any number of tokens may be selected, of which Transformer Engine refuses those
    that its kernels cannot cut into blocks.
    """
    if config.fp4 or (config.fp8 and config.fp8_recipe == Fp8Recipe.mxfp8):
        return 32
    return 16 if config.fp8 else 1


def filled(rows: Tensor, alignment: int) -> Tensor:
    """`[k b h]` with the fewest rows of zeros at the end that make `k · b` a multiple."""
    missing = -len(rows) % (alignment // math.gcd(alignment, rows.shape[1]))
    return F.pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows


def require_one_precision(config: TransformerConfig, first: int, count: int) -> None:
    """Raise ValueError where some of the unrolled layers `first .. first + count - 1` (0-based) are
    kept in bf16 by `first_last_layers_bf16` and would stand for weights that others quantize.

    Megatron enters one quantization context around a whole recursion, chosen by its first layer: the
    others would silently get that layer's precision.
    """
    if not (config.fp8 or config.fp4) or (config.fp8 and config.fp8_recipe == Fp8Recipe.delayed):
        return  # which covers every layer, and is refused (`validation`)
    kept = [n for n in range(first, first + count) if is_first_last_bf16_layer(config, n)]
    if kept:
        raise ValueError(
            f"num_layers_at_start_in_bf16={config.num_layers_at_start_in_bf16} and "
            f"num_layers_at_end_in_bf16={config.num_layers_at_end_in_bf16} reach into a recursion "
            f"over unrolled layers {first + 1} to {first + count} of {config.num_layers}, whose "
            f"layers share weights and so have one precision. Use at most {first} at the start and "
            f"{config.num_layers - first - count} at the end, or first_last_layers_bf16=False."
        )
