"""Routers, which decide how many times each token runs the recursion block."""

from mor_layers.routers.adaptive_halting import AdaptiveHalting
from mor_layers.routers.base import Router, RouterConfig
from mor_layers.routers.baselines import FixedDepth, FixedDepthRouter, RandomDepth
from mor_layers.routers.damped_loops import DampedLoops
from mor_layers.routers.declarations import PublishedRouter, ScorerMatrix, StepNotes
from mor_layers.routers.deepened import Deepened
from mor_layers.routers.depth_and_width import DepthAndWidth
from mor_layers.routers.early_exit import (
    Acceleration,
    Confidence,
    Criterion,
    Divergence,
    EarlyExitRouter,
    ExitProbability,
)
from mor_layers.routers.exit_gate import ExitGate
from mor_layers.routers.expert_choice import ExpertChoice
from mor_layers.routers.loop_state import LoopState
from mor_layers.routers.losses import masked_mean
from mor_layers.routers.random_loops import RandomLoops
from mor_layers.routers.registry import register_router, registered_routers
from mor_layers.routers.thresholds import NUM_BINS, Thresholds
from mor_layers.routers.token_choice import TokenChoice

__all__ = [
    "NUM_BINS",
    "Acceleration",
    "AdaptiveHalting",
    "Confidence",
    "Criterion",
    "DampedLoops",
    "Deepened",
    "DepthAndWidth",
    "Divergence",
    "EarlyExitRouter",
    "ExitGate",
    "ExitProbability",
    "ExpertChoice",
    "FixedDepth",
    "FixedDepthRouter",
    "LoopState",
    "PublishedRouter",
    "RandomDepth",
    "RandomLoops",
    "Router",
    "RouterConfig",
    "ScorerMatrix",
    "StepNotes",
    "Thresholds",
    "TokenChoice",
    "masked_mean",
    "register_router",
    "registered_routers",
]
