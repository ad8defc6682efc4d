"""Mixture-of-Recursions inside Megatron-Core transformer stacks.

The names below are imported when they are first used, so that `mor_megatron.parallel`, which plans
layouts, can be imported without Megatron-Core.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mor_layers.moved import keep_old_modules

if TYPE_CHECKING:
    from mor_megatron.layers import (
        Norm,
        RecursionLayer,
        RecursionSubmodules,
        RoutingReport,
        SDPACoreAttention,
    )
    from mor_megatron.models import default_layer_spec, mtp_block_spec, recursion_block_spec
    from mor_megatron.models.gpt import recursion_layer_spec
    from mor_megatron.pipeline import (
        connect_stages,
        recursion_forward_backward,
        recursion_pipeline_spec,
    )
    from mor_megatron.pipeline.spec import carried_length
    from mor_megatron.training import (
        causal_routing,
        log_routing,
        recursion_layers,
        routing_reports,
        token_depths,
        update_routers,
        update_routers_automatically,
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
    "log_routing",
    "mtp_block_spec",
    "recursion_block_spec",
    "recursion_forward_backward",
    "recursion_layer_spec",
    "recursion_layers",
    "recursion_pipeline_spec",
    "routing_reports",
    "token_depths",
    "update_routers",
    "update_routers_automatically",
]

_PLACES = {
    "Norm": "layers",
    "RecursionLayer": "layers",
    "RecursionSubmodules": "layers",
    "RoutingReport": "layers",
    "SDPACoreAttention": "layers",
    "carried_length": "pipeline.spec",
    "causal_routing": "training",
    "connect_stages": "pipeline",
    "default_layer_spec": "models",
    "log_routing": "training",
    "mtp_block_spec": "models",
    "recursion_block_spec": "models",
    "recursion_forward_backward": "pipeline",
    "recursion_layer_spec": "models.gpt",
    "recursion_layers": "training",
    "recursion_pipeline_spec": "pipeline",
    "routing_reports": "training",
    "token_depths": "training",
    "update_routers": "training",
    "update_routers_automatically": "training",
}
_PACKAGES = (
    "checkpoints",
    "layers",
    "models",
    "parallel",
    "pipeline",
    "platform",
    "step",
    "training",
)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value  # later accesses find it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})


# Import paths of version 0.1.
keep_old_modules(
    __name__,
    {
        "apex": ("platform.apex",),
        "attention": ("layers.attention.grouped_query", "layers.attention.core"),
        "checkpoint_models": ("checkpoints.models",),
        "checkpointing": ("checkpoints.runs",),
        "cpu": ("platform.cpu",),
        "distillation": ("training.distillation",),
        "engine": ("platform.transformer_engine", "layers.attention.documents"),
        "generation": ("checkpoints.torch_model",),
        "hybrid": ("models.hybrid",),
        "hybrid_pattern": ("models.hybrid_pattern",),
        "layer": ("layers.recursion",),
        "megatron_lm": ("models.megatron_lm",),
        "moe": ("layers.experts.moe",),
        "norms": ("layers.sublayers.norms",),
        "packing": ("step.packing",),
        "placement": ("step.placement",),
        "specs": ("models.gpt", "platform.transformer_engine"),
        "statistics": ("layers.routing.counts",),
        "validation": ("layers.validation",),
        "weights": ("checkpoints.weights", "checkpoints.shards"),
    },
)
