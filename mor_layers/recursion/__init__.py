"""The recursion itself: the block, what attention sees at each step, and what steps share."""

from mor_layers.recursion.attention import attend, causal_mask, visible
from mor_layers.recursion.block import RecursionBlock, RecursionLayers, RecursionOutput, summed
from mor_layers.recursion.block_masks import attends_by_blocks, block_mask
from mor_layers.recursion.expert_use import ExpertRecorder, ExpertUse
from mor_layers.recursion.history import History, HistoryInjection
from mor_layers.recursion.kv_policies import (
    KV_POLICIES,
    Exited,
    ExitStateContext,
    KVPolicy,
    Products,
    SharingContext,
    StepContext,
    begin_step,
)
from mor_layers.recursion.loop_loss import LoopLoss, expected_loss, over_loops
from mor_layers.recursion.observer import RoutedStep, RoutingObserver
from mor_layers.recursion.sharing import (
    SHARING_SCHEMES,
    Sharing,
    SharingSchedule,
    end_layers,
    require_lengths,
)
from mor_layers.recursion.step_input import StateAdapter, StepInput
from mor_layers.recursion.streams import HyperConnections, Streams

__all__ = [
    "KV_POLICIES",
    "SHARING_SCHEMES",
    "ExitStateContext",
    "Exited",
    "ExpertRecorder",
    "ExpertUse",
    "History",
    "HistoryInjection",
    "HyperConnections",
    "KVPolicy",
    "LoopLoss",
    "Products",
    "RecursionBlock",
    "RecursionLayers",
    "RecursionOutput",
    "RoutedStep",
    "RoutingObserver",
    "Sharing",
    "SharingContext",
    "SharingSchedule",
    "StateAdapter",
    "StepContext",
    "StepInput",
    "Streams",
    "attend",
    "attends_by_blocks",
    "begin_step",
    "block_mask",
    "causal_mask",
    "end_layers",
    "expected_loss",
    "over_loops",
    "require_lengths",
    "summed",
    "visible",
]
