"""Layers for use inside a recursion: a mixture of experts, per-step deltas, and adapters."""

from mor_layers.layers.adapters import EncoderLayers, PointwiseLayers
from mor_layers.layers.moe import MOST_EXPERTS, ExpertRouters, MoE, MoEConfig
from mor_layers.layers.relaxation import (
    MLP_PROJECTIONS,
    Projection,
    Relaxation,
    RelaxedLinear,
    StepDelta,
    make_projection,
    merged_weight,
    norms_over_ranks,
    project,
    row_norms,
)

__all__ = [
    "MLP_PROJECTIONS",
    "MOST_EXPERTS",
    "EncoderLayers",
    "ExpertRouters",
    "MoE",
    "MoEConfig",
    "PointwiseLayers",
    "Projection",
    "Relaxation",
    "RelaxedLinear",
    "StepDelta",
    "make_projection",
    "merged_weight",
    "norms_over_ranks",
    "project",
    "row_norms",
]
