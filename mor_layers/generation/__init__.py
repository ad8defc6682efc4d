"""Generation: an engine that batches the tokens of all requests and all recursion steps."""

from mor_layers.generation.cache.caches import CacheSettings
from mor_layers.generation.cache.policies import CACHE_POLICIES
from mor_layers.generation.depth.calibration import Calibration, calibrate
from mor_layers.generation.depth.deepening import deepened
from mor_layers.generation.depth.dial import turn_dial
from mor_layers.generation.depth.early_exit import with_early_exit
from mor_layers.generation.drafts.speculation import (
    HeadSpeculation,
    Speculation,
    SpeculativeDecoder,
)
from mor_layers.generation.engine import DepthBatchingEngine, Event
from mor_layers.generation.incremental import IncrementalDecoder
from mor_layers.generation.ranks.tensor_parallel import shard
from mor_layers.generation.sampling import Sampling
from mor_layers.generation.scheduling import Request

__all__ = [
    "CACHE_POLICIES",
    "CacheSettings",
    "Calibration",
    "DepthBatchingEngine",
    "Event",
    "HeadSpeculation",
    "IncrementalDecoder",
    "Request",
    "Sampling",
    "Speculation",
    "SpeculativeDecoder",
    "calibrate",
    "deepened",
    "shard",
    "turn_dial",
    "with_early_exit",
]
