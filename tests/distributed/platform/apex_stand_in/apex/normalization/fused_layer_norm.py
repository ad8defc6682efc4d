"""Norms whose output has the weight's dtype; computed in fp32."""

from typing import Any

import fused_layer_norm_cuda  # noqa: F401  (the real one calls it)
import torch
import torch.nn.functional as F
from torch import Tensor

calls: list[str] = []


def mixed_dtype_fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: Any, eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:  # fmt: skip
    calls.append("rms_norm")
    return F.rms_norm(input.float(), normalized_shape, weight.float(), eps).type_as(weight)


def mixed_dtype_fused_layer_norm_affine(
    input: Tensor, weight: Tensor, bias: Tensor, normalized_shape: Any, eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:  # fmt: skip
    calls.append("layer_norm")
    out = F.layer_norm(input.float(), normalized_shape, weight.float(), bias.float(), eps)
    return out.type_as(weight)


class FusedLayerNormAffineFunction(torch.autograd.Function):
    """Megatron imports it."""
