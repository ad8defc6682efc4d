"""Rotary position embedding at given positions.

Legend: `b` batch, `k` tokens, `n` heads, `d` head size.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mor_layers.cpu_kernels import rotate
from mor_layers.models.rope_scaling import RopeScaling


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding at given positions (Su et al. 2021, where the halves of a head are paired)."""

    cos: Float[Tensor, "k b 1 d"]
    sin: Float[Tensor, "k b 1 d"]
    """Negative in the first half, which is what its product with the second half of a head needs."""

    @classmethod
    def at(
        cls,
        positions: Int[Tensor, "k b"],
        head_size: int,
        base: float,
        dtype: torch.dtype,
        scaling: RopeScaling | None = None,
    ) -> "Rotary":
        """The rotation for each position, computed in fp32. With a scaling, it also lengthens heads."""
        exponent = torch.arange(0, head_size, 2, device=positions.device).float() / head_size
        frequencies = base**-exponent
        if scaling is not None:
            frequencies = scaling.scale(frequencies, base)
        angles = positions[..., None].float() * frequencies  # [k b] -> [k b d/2]
        angles = angles[:, :, None]
        cos, sin = angles.cos(), angles.sin()
        if scaling is not None and scaling.concentration != 1:
            cos, sin = cos * scaling.concentration, sin * scaling.concentration
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return cls(cos.to(dtype), sin.to(dtype))

    def turn(self, heads: Float[Tensor, "k b n d"]) -> Float[Tensor, "k b n d"]:
        """Rotate the heads of the first `k` rows."""
        return rotate(heads, self.cos[: len(heads)], self.sin[: len(heads)])
