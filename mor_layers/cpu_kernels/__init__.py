"""Kernels for CPUs, which a C++ compiler makes for the processor at hand, once.

Each function computes what plain PyTorch computes, in one pass over memory, and falls back to it
wherever the kernels do not apply: see `applies`. They are for inference: nothing here has gradients.
"""

from mor_layers.cpu_kernels.attention import attends_to, paged_attention
from mor_layers.cpu_kernels.capability import applies, without_cpu_kernels
from mor_layers.cpu_kernels.rows import rms_norm, rotate, swiglu

__all__ = [
    "applies",
    "attends_to",
    "paged_attention",
    "rms_norm",
    "rotate",
    "swiglu",
    "without_cpu_kernels",
]
