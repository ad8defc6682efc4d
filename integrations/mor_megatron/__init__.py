"""Mixture-of-Recursions inside Megatron-Core transformer stacks."""

from mor_megatron.attention import SDPACoreAttention
from mor_megatron.layer import RecursionLayer, RecursionSubmodules
from mor_megatron.norms import Norm
from mor_megatron.pipeline import (
    carried_length,
    connect_stages,
    recursion_forward_backward,
    recursion_pipeline_spec,
)
from mor_megatron.specs import default_layer_spec, recursion_block_spec, recursion_layer_spec
from mor_megatron.statistics import RoutingReport
from mor_megatron.training import (
    causal_routing,
    recursion_layers,
    routing_reports,
    token_depths,
    update_routers,
)

__all__ = [
    "Norm",
    "RecursionLayer",
    "RecursionSubmodules",
    "RoutingReport",
    "SDPACoreAttention",
    "carried_length",
    "causal_routing",
    "connect_stages",
    "default_layer_spec",
    "recursion_block_spec",
    "recursion_forward_backward",
    "recursion_layer_spec",
    "recursion_layers",
    "recursion_pipeline_spec",
    "routing_reports",
    "token_depths",
    "update_routers",
]
