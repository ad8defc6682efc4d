"""Estimates the cost of a training step in every parallel layout, without building a model."""

from mor_megatron.parallel import PipelineLayout
from mor_tools.planner.chunks import carried_rows
from mor_tools.planner.evaluate import evaluate, timeline
from mor_tools.planner.hardware import FP32_TFLOPS, HARDWARE, Hardware
from mor_tools.planner.layouts import Layout, Memory, Plan, StagePlan, Workload
from mor_tools.planner.memory import RECOMPUTE, Recompute
from mor_tools.planner.report import (
    describe,
    draw,
    inference_table,
    parts_table,
    plans_table,
    refusals,
    starvation,
)
from mor_tools.planner.search import Search, nearest, refusal, search

__all__ = [
    "FP32_TFLOPS",
    "HARDWARE",
    "RECOMPUTE",
    "Hardware",
    "Layout",
    "Memory",
    "PipelineLayout",
    "Plan",
    "Recompute",
    "Search",
    "StagePlan",
    "Workload",
    "carried_rows",
    "describe",
    "draw",
    "evaluate",
    "inference_table",
    "nearest",
    "parts_table",
    "plans_table",
    "refusal",
    "refusals",
    "search",
    "starvation",
    "timeline",
]
