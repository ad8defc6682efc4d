"""Rotary positions of selected tokens: a table indexed by the places they have in the sequence.

Legend: `s` sequence, `b` batch, `k` tokens that run a step, `n` heads, `d` head size, `r` rotary size.
"""

from dataclasses import dataclass

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor


@dataclass(frozen=True)
class StepRotation:
    """Rotary embedding at the positions of a step's tokens, or of all.

    Transformer Engine's fused kernel turns row `i` of `[rows 1 n d]` by row `i` of a table
    `[rows 1 1 r]`, the same for the whole batch. Selected tokens of several sequences are therefore
    given to it as one sequence of `k · b` rows, with a table of as many.
    """

    cos: Tensor
    sin: Tensor
    """`[s|k b|1 1 r]`, in the dtype of what they turn."""
    angles: Tensor | None = None
    """fp32, `[s 1 1 r]` or `[k·b 1 1 r]`: what the fused kernel takes; None where it is not used."""

    @classmethod
    def table(
        cls, angles: Tensor, scale: float, dtype: torch.dtype, fused: bool = False
    ) -> "StepRotation":
        """Of all positions, from Megatron's `rotary_pos_emb` `[s 1 1 r]`.

        Args:
            scale: of cosines and sines (YaRN); the fused kernel has none.
            fused: whether to use it (`apply_rope_fusion`), where Transformer Engine is there.
        """
        angles = angles.float()
        cos, sin = angles.cos() * scale, angles.sin() * scale
        has_kernel = rope_utils.fused_apply_rotary_pos_emb is not None
        return cls(
            cos.to(dtype), sin.to(dtype), angles if fused and has_kernel and scale == 1.0 else None
        )

    def at(self, positions: Tensor) -> "StepRotation":
        """Of the given positions `[k b]`."""
        angles = None if self.angles is None else self.angles[positions.flatten()]
        return StepRotation(self.cos[:, 0][positions], self.sin[:, 0][positions], angles)

    def turn(self, heads: Tensor) -> Tensor:
        """`[k b n d] -> [k b n d]`, the first `k` positions; a head's numbers beyond `r` stay."""
        if self.angles is not None:
            rows = heads.flatten(0, 1)[:, None]  # [k b n d] -> [k·b 1 n d]
            turned = rope_utils.fused_apply_rotary_pos_emb(rows, self.angles[: len(rows)])  # type: ignore[misc]
            return turned.view_as(heads)
        size, cos, sin = self.cos.shape[-1], self.cos[: len(heads)], self.sin[: len(heads)]
        turned, rest = heads[..., :size], heads[..., size:]
        turned = turned * cos + rope_utils._rotate_half(turned, False) * sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
