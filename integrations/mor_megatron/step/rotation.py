"""Rotary embedding of selected tokens, at the positions that they have in the sequence.

Legend: `s` sequence, `b` batch, `k` tokens that run a step, `n` heads, `d` head size, `r` rotary size.
"""

from dataclasses import dataclass, replace

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor


@dataclass(frozen=True)
class StepRotation:
    """Rotary embedding at the positions of a step's tokens, or at all positions.

    Transformer Engine's fused kernel rotates row `i` of `[rows b n d]` by row `i` of a table
    `[rows 1 1 r]`, which is the same for the whole batch. The selected tokens of different sequences
    have different positions, so they are passed as one sequence of `k · b` rows, with a table of the
    same length.
    """

    cos: Tensor
    sin: Tensor
    """`[s|k b|1 1 r]`, in the dtype of the queries and keys."""
    angles: Tensor | None = None
    """fp32, `[s 1 1 r]` or `[k·b 1 1 r]`: the input of the fused kernel. None if it is not used."""
    is_interleaved: bool = False
    """Whether neighbouring elements of a head form the pairs that are rotated (`rotary_interleaved`),
    and not an element of the first half with one of the second."""
    regroups: bool = False
    """Whether a head is first put in the order of its even elements, then its odd ones, as multi-latent
    attention does: its projections are those of interleaved pairs."""

    @classmethod
    def table(
        cls,
        angles: Tensor,
        scale: float,
        dtype: torch.dtype,
        fused: bool = False,
        is_interleaved: bool = False,
        regroups: bool = False,
    ) -> "StepRotation":
        """The rotation at all positions, from Megatron's `rotary_pos_emb` `[s 1 1 r]`.

        Args:
            scale: factor of cosines and sines (YaRN). The fused kernel supports no scale but 1.
            fused: use the fused kernel (`apply_rope_fusion`) if Transformer Engine is installed.
            is_interleaved, regroups: see the fields.
        """
        angles = angles.float()
        cos, sin = angles.cos() * scale, angles.sin() * scale
        has_kernel = rope_utils.fused_apply_rotary_pos_emb is not None
        is_fused = fused and has_kernel and scale == 1.0 and not regroups
        return cls(
            cos.to(dtype), sin.to(dtype), angles if is_fused else None, is_interleaved, regroups
        )

    def restarting(self, offsets: Tensor) -> "StepRotation":
        """The rotation of a packed sequence, whose positions restart with each document.

        Args:
            offsets: position of each token in its document, `[s]`. Those beyond the table are of
                padding.
        """
        rows = offsets.clamp(max=len(self.cos) - 1)
        angles = None if self.angles is None else self.angles[rows]
        return replace(self, cos=self.cos[rows], sin=self.sin[rows], angles=angles)

    def at(self, positions: Tensor) -> "StepRotation":
        """The rotation at the given positions `[k b]`."""
        angles = None if self.angles is None else self.angles[positions.flatten()]
        return replace(
            self, cos=self.cos[:, 0][positions], sin=self.sin[:, 0][positions], angles=angles
        )

    def turn(self, heads: Tensor) -> Tensor:
        """Rotate `[k b n d]` by the first `k` positions. Elements of a head beyond `r` are kept."""
        if self.angles is not None:
            rows = heads.flatten(0, 1)[:, None]  # [k b n d] -> [k·b 1 n d]
            turned = rope_utils.fused_apply_rotary_pos_emb(  # type: ignore[misc]
                rows, self.angles[: len(rows)], interleaved=self.is_interleaved
            )
            return turned.view_as(heads)
        size, cos, sin = self.cos.shape[-1], self.cos[: len(heads)], self.sin[: len(heads)]
        turned, rest = heads[..., :size], heads[..., size:]
        if self.regroups:
            turned = torch.cat([turned[..., ::2], turned[..., 1::2]], dim=-1)
        turned = turned * cos + rope_utils._rotate_half(turned, self.is_interleaved) * sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
