"""What a training step costs in every parallel layout, before anything is built."""

from mor_tools.planner.evaluate import evaluate
from mor_tools.planner.hardware import FP32_TFLOPS, HARDWARE, Hardware
from mor_tools.planner.layouts import Layout, Plan, Workload
from mor_tools.planner.memory import RECOMPUTE, Recompute
from mor_tools.planner.pipeline import (
    PipelineAccount,
    PipelineLayout,
    PipelinePlan,
    pipeline_account,
)
from mor_tools.planner.report import (
    describe,
    draw,
    inference_table,
    parts_table,
    plans_table,
    refusals,
)
from mor_tools.planner.search import Search, search

__all__ = [
    "FP32_TFLOPS",
    "HARDWARE",
    "RECOMPUTE",
    "Hardware",
    "Layout",
    "PipelineAccount",
    "PipelineLayout",
    "PipelinePlan",
    "Plan",
    "Recompute",
    "Search",
    "Workload",
    "describe",
    "draw",
    "evaluate",
    "inference_table",
    "parts_table",
    "pipeline_account",
    "plans_table",
    "refusals",
    "search",
]
