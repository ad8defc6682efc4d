"""Functions for training loops: router updates, reports, and distillation."""

from mor_megatron.training.distillation import vocab_parallel_divergence
from mor_megatron.training.routers import (
    causal_routing,
    recursion_layers,
    routing_reports,
    token_depths,
    update_routers,
)

__all__ = [
    "causal_routing",
    "recursion_layers",
    "routing_reports",
    "token_depths",
    "update_routers",
    "vocab_parallel_divergence",
]
