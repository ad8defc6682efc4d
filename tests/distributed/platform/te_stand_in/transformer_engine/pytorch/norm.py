"""LayerNorm and RMSNorm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine.signatures import bound


def normalized(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms: bool, zero_centered: bool
) -> Tensor:
    """In fp32, as the kernels compute."""
    scale = weight.float() + 1 if zero_centered else weight.float()
    if is_rms:
        out = F.rms_norm(x.float(), scale.shape, scale, eps)
    else:
        out = F.layer_norm(
            x.float(), scale.shape, scale, None if bias is None else bias.float(), eps
        )
    return out.type_as(x)


class _Norm(nn.Module):
    is_rms: bool

    def _build(self, given: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        device, dtype = given.get("device"), given.get("params_dtype")
        self.eps, self.zero_centered_gamma = given["eps"], given.get("zero_centered_gamma", False)
        fill = 0.0 if self.zero_centered_gamma else 1.0
        size = given["normalized_shape"]
        self.weight = nn.Parameter(torch.full((size,), fill, device=device, dtype=dtype))
        self.bias = None if self.is_rms else nn.Parameter(torch.zeros_like(self.weight))
        for parameter in self.parameters():
            setattr(parameter, "sequence_parallel", given.get("sequence_parallel"))  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        return normalized(
            x, self.weight, self.bias, self.eps, self.is_rms, self.zero_centered_gamma
        )


class LayerNorm(_Norm):
    is_rms = False

    @bound("LayerNorm.__init__")
    def __init__(self, given: dict[str, Any]) -> None:
        self._build(given)


class RMSNorm(_Norm):
    is_rms = True

    @bound("RMSNorm.__init__")
    def __init__(self, given: dict[str, Any]) -> None:
        self._build(given)
