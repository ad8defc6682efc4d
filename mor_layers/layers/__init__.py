"""Layers for use inside a recursion: experts, projections and their deltas, and adapters."""

from mor_layers.layers.adapters import EncoderLayers, PointwiseLayers
from mor_layers.layers.modulation import Modulator, NormModulation
from mor_layers.layers.moe import (
    MOST_EXPERTS,
    Assignment,
    ExpertRouter,
    ExpertRouters,
    Experts,
    MoE,
    MoEConfig,
)
from mor_layers.layers.projections import (
    ATTENTION_PROJECTIONS,
    PROJECTIONS_OF,
    SUBLAYERS,
    Projected,
    StepLinear,
    Sublayer,
    make_projection,
    project,
    run_projection,
    weights_of,
)
from mor_layers.layers.relaxation import (
    MLP_PROJECTIONS,
    Projection,
    Relaxation,
    RelaxedLinear,
    StepDelta,
    merged_weight,
    norms_over_ranks,
    row_norms,
)

__all__ = [
    "ATTENTION_PROJECTIONS",
    "MLP_PROJECTIONS",
    "MOST_EXPERTS",
    "PROJECTIONS_OF",
    "SUBLAYERS",
    "Assignment",
    "EncoderLayers",
    "ExpertRouter",
    "ExpertRouters",
    "Experts",
    "MoE",
    "MoEConfig",
    "Modulator",
    "NormModulation",
    "PointwiseLayers",
    "Projected",
    "Projection",
    "Relaxation",
    "RelaxedLinear",
    "StepDelta",
    "StepLinear",
    "Sublayer",
    "make_projection",
    "merged_weight",
    "norms_over_ranks",
    "project",
    "row_norms",
    "run_projection",
    "weights_of",
]
