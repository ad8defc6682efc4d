"""Routers, which decide how many times each token runs the recursion block.

`base` says what a router is, and `registry` by which names settings call them. The routers themselves
are in `choice`, `exits` and `loops`; `scorer`, `capacity`, `losses` and `thresholds` are what they are
made of.
"""

from mor_layers.routers.base import Router, RouterConfig
from mor_layers.routers.choice.depth_and_width import DepthAndWidth
from mor_layers.routers.choice.expert_choice import ExpertChoice
from mor_layers.routers.choice.token_choice import TokenChoice
from mor_layers.routers.declarations import PublishedRouter, ScorerMatrix, StepNotes
from mor_layers.routers.deepened import Deepened
from mor_layers.routers.exits.adaptive_halting import AdaptiveHalting
from mor_layers.routers.exits.early_exit import (
    Acceleration,
    Confidence,
    Criterion,
    Divergence,
    EarlyExitRouter,
    ExitProbability,
)
from mor_layers.routers.exits.exit_gate import ExitGate
from mor_layers.routers.loop_state import LoopState
from mor_layers.routers.loops.baselines import FixedDepth, FixedDepthRouter, RandomDepth
from mor_layers.routers.loops.damped_loops import DampedLoops
from mor_layers.routers.loops.random_loops import RandomLoops
from mor_layers.routers.losses import masked_mean
from mor_layers.routers.registry import register_router, registered_routers
from mor_layers.routers.thresholds import NUM_BINS, Thresholds

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
