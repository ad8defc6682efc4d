"""What a planted fault is: text that stands exactly once in its file, and what takes its place."""

from dataclasses import dataclass

CORE, MEGATRON, TOOLS = "mor_layers/", "integrations/mor_megatron/", "integrations/mor_tools/"


@dataclass(frozen=True)
class Fault:
    """One change of the code."""

    what: str
    """What is wrong then."""
    file: str
    old: str
    new: str
    tests: str
    """Files or folders under `tests`, separated by spaces, that should notice."""
