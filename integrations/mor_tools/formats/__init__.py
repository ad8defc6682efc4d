"""Formats of model folders and checkpoints, and reading and writing each."""

from mor_tools.formats.published import (
    config_from_published,
    from_published,
    load_published,
    published_names,
)
from mor_tools.formats.registry import FORMATS, Format, detected, read_settings

__all__ = [
    "FORMATS",
    "Format",
    "config_from_published",
    "detected",
    "from_published",
    "load_published",
    "published_names",
    "read_settings",
]
