"""Mixture-of-Recursions and Mixture-of-Experts as composable PyTorch layers."""

from mor_layers.adapters import EncoderLayers, PointwiseLayers
from mor_layers.attention import KVPolicy, StepContext, attend, causal_mask
from mor_layers.caches import CacheSettings
from mor_layers.calibration import Calibration, calibrate
from mor_layers.config import (
    DecoderConfig,
    RecursionConfig,
    from_mapping,
    load_config,
    to_mapping,
)
from mor_layers.deepening import Deepened, deepened
from mor_layers.depth_batching import DepthBatchingEngine, Event
from mor_layers.distillation import Distillation, DistilledOutput, Distiller
from mor_layers.early_exit import (
    Acceleration,
    Confidence,
    Criterion,
    Divergence,
    ExitProbability,
    with_early_exit,
)
from mor_layers.healing import Healing, heal
from mor_layers.inspection import Inspection, inspect_text
from mor_layers.moe import ExpertRouters, ExpertUse, MoE, MoEConfig
from mor_layers.published import (
    config_from_published,
    from_published,
    load_published,
    published_names,
)
from mor_layers.recursion import RecursionBlock, RecursionLayers, RecursionOutput
from mor_layers.relaxation import Relaxation
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
    registered_routers,
)
from mor_layers.routing import LocalPlacement, Placement, RoutingDecision, Tokens
from mor_layers.sampling import Sampling
from mor_layers.scheduling import Request
from mor_layers.sharing import Sharing, SharingSchedule
from mor_layers.thresholds import Thresholds, turn_dial
from mor_layers.transformer import DecoderOutput, DecoderStack, MoRTransformer

__all__ = [
    "Acceleration",
    "CacheSettings",
    "Calibration",
    "Confidence",
    "Criterion",
    "DecoderConfig",
    "DecoderOutput",
    "DecoderStack",
    "Deepened",
    "DepthAndWidth",
    "DepthBatchingEngine",
    "Distillation",
    "DistilledOutput",
    "Distiller",
    "Divergence",
    "EncoderLayers",
    "Event",
    "ExitProbability",
    "ExpertChoice",
    "ExpertRouters",
    "ExpertUse",
    "FixedDepth",
    "Healing",
    "Inspection",
    "KVPolicy",
    "LocalPlacement",
    "MoE",
    "MoEConfig",
    "MoRTransformer",
    "Placement",
    "PointwiseLayers",
    "RandomDepth",
    "RandomLoops",
    "RecursionBlock",
    "RecursionConfig",
    "RecursionLayers",
    "RecursionOutput",
    "Relaxation",
    "Request",
    "Router",
    "RouterConfig",
    "RoutingDecision",
    "Sampling",
    "Sharing",
    "SharingSchedule",
    "StepContext",
    "Thresholds",
    "TokenChoice",
    "Tokens",
    "attend",
    "calibrate",
    "causal_mask",
    "config_from_published",
    "deepened",
    "from_mapping",
    "from_published",
    "heal",
    "inspect_text",
    "load_config",
    "load_published",
    "published_names",
    "register_router",
    "registered_routers",
    "to_mapping",
    "turn_dial",
    "with_early_exit",
]
