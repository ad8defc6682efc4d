"""A tick as one compiled graph: `tick` is the graph, `driver` the host's part of it.

rows       tokens in flight, in tensors whose shapes say nothing about them
routing    the router's decisions, without sizes that depend on them
attention  to the cache, in place or gathered; `context` hands it to the layers
choosing   the next tokens, and which of them follow without the host
tick       the whole tick as a function of tensors
compiling  the function as a graph; `replay` records it on a GPU; `sizes` of its tensors
report     what the host reads afterwards
driver     chooses sizes, runs the graph, and reads the report
"""

from mor_layers.generation.tick.graph.choosing import NOT_CHOSEN, NUM_STOP_IDS
from mor_layers.generation.tick.graph.compiling import Backend
from mor_layers.generation.tick.graph.driver import StaticTick
from mor_layers.generation.tick.graph.report import LeftTick

__all__ = ["NOT_CHOSEN", "NUM_STOP_IDS", "Backend", "LeftTick", "StaticTick"]
