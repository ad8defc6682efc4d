"""Which tokens run a step: the token in each row, the decision, and where rows are stored."""

from mor_layers.selection.capacity import capacity
from mor_layers.selection.decision import RoutingDecision
from mor_layers.selection.placement import LocalPlacement, Placement
from mor_layers.selection.tokens import Tokens, put_rows, take_rows

__all__ = [
    "LocalPlacement",
    "Placement",
    "RoutingDecision",
    "Tokens",
    "capacity",
    "put_rows",
    "take_rows",
]
