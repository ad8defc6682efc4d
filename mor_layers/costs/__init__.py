"""Exact counts of parameters, FLOPs and key-value bytes."""

from mor_layers.costs.counting import Accounting, account, count_parameters, relaxed_projections
from mor_layers.costs.shapes import ModelShape, RouterShape, StackShape

__all__ = [
    "Accounting",
    "ModelShape",
    "RouterShape",
    "StackShape",
    "account",
    "count_parameters",
    "relaxed_projections",
]
