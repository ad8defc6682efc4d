"""Routers: who decides how many times a token runs the recursion block."""

from mor_layers.routers.base import Router, RouterConfig, register_router, registered_routers
from mor_layers.routers.baselines import FixedDepth, RandomDepth, RandomLoops
from mor_layers.routers.depth_and_width import DepthAndWidth
from mor_layers.routers.expert_choice import ExpertChoice
from mor_layers.routers.token_choice import TokenChoice

__all__ = [
    "DepthAndWidth",
    "ExpertChoice",
    "FixedDepth",
    "RandomDepth",
    "RandomLoops",
    "Router",
    "RouterConfig",
    "TokenChoice",
    "register_router",
    "registered_routers",
]
