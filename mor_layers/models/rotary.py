"""Rotary position embedding at given positions.

Legend: `b` batch, `k` tokens, `n` heads, `d` head size.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding at given positions (Su et al. 2021, where the halves of a head are paired)."""

    cos: Float[Tensor, "k b 1 d"]
    sin: Float[Tensor, "k b 1 d"]
    """Negative in the first half, which is what its product with the second half of a head needs."""

    @classmethod
    def at(
        cls, positions: Int[Tensor, "k b"], head_size: int, base: float, dtype: torch.dtype
    ) -> "Rotary":
        """The rotation for each position, computed in fp32."""
        exponent = torch.arange(0, head_size, 2, device=positions.device).float() / head_size
        angles = positions[..., None].float() * base**-exponent  # [k b] -> [k b d/2]
        angles = torch.cat([angles, angles], dim=-1)[:, :, None]
        first, second = angles.sin().chunk(2, dim=-1)
        return cls(angles.cos().to(dtype), torch.cat([-first, second], dim=-1).to(dtype))

    def turn(self, heads: Float[Tensor, "k b n d"]) -> Float[Tensor, "k b n d"]:
        """Rotate the heads of the first `k` rows."""
        first, second = heads.chunk(2, dim=-1)
        cos, sin = self.cos[: len(heads)], self.sin[: len(heads)]
        return heads * cos + torch.cat([second, first], dim=-1) * sin
