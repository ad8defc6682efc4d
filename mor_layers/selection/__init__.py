"""Which tokens run a step: who stands in which row, what was decided, where rows live."""

from mor_layers.selection.decision import RoutingDecision
from mor_layers.selection.placement import LocalPlacement, Placement
from mor_layers.selection.tokens import Tokens, put_rows, take_rows

__all__ = ["LocalPlacement", "Placement", "RoutingDecision", "Tokens", "put_rows", "take_rows"]
