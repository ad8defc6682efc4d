"""Mixture-of-Recursions and Mixture-of-Experts as composable PyTorch layers."""

from typing import Any

from mor_layers.layers import MoE, MoEConfig, Relaxation
from mor_layers.models import DecoderConfig, DecoderOutput, MoRTransformer, RecursionConfig
from mor_layers.moved import MODULES, keep_old_modules, name_of_old_face
from mor_layers.recursion import RecursionBlock, RecursionLayers, RecursionOutput, StepContext
from mor_layers.routers import (
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    RandomDepth,
    RandomLoops,
    Router,
    RouterConfig,
    TokenChoice,
    register_router,
)
from mor_layers.selection import RoutingDecision, Tokens
from mor_layers.settings import from_mapping, load_config, to_mapping
from mor_layers.weights import load_model, save_model

__version__ = "0.2.0"

__all__ = [
    "DecoderConfig",
    "DecoderOutput",
    "DepthAndWidth",
    "ExpertChoice",
    "FixedDepth",
    "MoE",
    "MoEConfig",
    "MoRTransformer",
    "RandomDepth",
    "RandomLoops",
    "RecursionBlock",
    "RecursionConfig",
    "RecursionLayers",
    "RecursionOutput",
    "Relaxation",
    "Router",
    "RouterConfig",
    "RoutingDecision",
    "StepContext",
    "TokenChoice",
    "Tokens",
    "__version__",
    "from_mapping",
    "load_config",
    "load_model",
    "register_router",
    "save_model",
    "to_mapping",
]

keep_old_modules(__name__, MODULES)


def __getattr__(name: str) -> Any:
    return name_of_old_face(name)
