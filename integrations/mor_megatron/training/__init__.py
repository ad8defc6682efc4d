"""Functions for training loops: router updates, reports, and distillation."""

from mor_megatron.layers import (
    log_routing,
    recursion_layers,
    update_routers,
    update_routers_automatically,
)
from mor_megatron.training.compiling import compile_recursions
from mor_megatron.training.distillation import vocab_parallel_divergence
from mor_megatron.training.loop_losses import weigh_loops
from mor_megatron.training.routers import causal_routing, routing_reports, token_depths

__all__ = [
    "causal_routing",
    "compile_recursions",
    "log_routing",
    "recursion_layers",
    "routing_reports",
    "token_depths",
    "update_routers",
    "update_routers_automatically",
    "vocab_parallel_divergence",
    "weigh_loops",
]
