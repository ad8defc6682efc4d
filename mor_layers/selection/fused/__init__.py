"""Selection and write-back fused with what stands next to them, as Triton kernels on GPUs.

Each function computes what plain PyTorch computes, and falls back to it wherever the kernels do not
apply: see `fuses`. Nothing needs Triton.
"""

from mor_layers.selection.fused.capability import (
    are_fused_kernels_allowed,
    fuses,
    without_fused_kernels,
)
from mor_layers.selection.fused.gating import add_gated
from mor_layers.selection.fused.norm import RMSNormWeight, rms_norm, take_and_norm

__all__ = [
    "RMSNormWeight",
    "add_gated",
    "are_fused_kernels_allowed",
    "fuses",
    "rms_norm",
    "take_and_norm",
    "without_fused_kernels",
]
