"""Megatron layers that know which recursion step they run, and the recursion itself as one layer."""

from mor_megatron.layers.absorbed import AbsorbedLayer
from mor_megatron.layers.attention.core import SDPACoreAttention
from mor_megatron.layers.attention.documents import document_attention
from mor_megatron.layers.attention.latent import LatentAttention
from mor_megatron.layers.block_part import BlockPart
from mor_megatron.layers.experts.padding import aware_of_padding
from mor_megatron.layers.experts.router import StepTopKRouter
from mor_megatron.layers.recursion import RecursionLayer, RecursionSubmodules
from mor_megatron.layers.routing.counts import RoutingReport
from mor_megatron.layers.routing.training_log import log_routing
from mor_megatron.layers.routing.updates import (
    recursion_layers,
    update_routers,
    update_routers_automatically,
)
from mor_megatron.layers.sequence_inputs import refuse_inputs
from mor_megatron.layers.sublayers.norms import Norm, local_norm
from mor_megatron.layers.validation import validate

__all__ = [
    "AbsorbedLayer",
    "BlockPart",
    "LatentAttention",
    "Norm",
    "RecursionLayer",
    "RecursionSubmodules",
    "RoutingReport",
    "SDPACoreAttention",
    "StepTopKRouter",
    "aware_of_padding",
    "document_attention",
    "local_norm",
    "log_routing",
    "recursion_layers",
    "refuse_inputs",
    "update_routers",
    "update_routers_automatically",
    "validate",
]
