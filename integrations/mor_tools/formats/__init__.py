"""The formats of model folders and checkpoints, with a reader and a writer for each."""

from mor_tools.formats.published import (
    config_from_published,
    from_published,
    load_published,
    published_names,
)
from mor_tools.formats.registry import (
    FORMATS,
    RUN_CHECKPOINTS,
    RUN_CLAIM,
    RUN_MODEL,
    Format,
    detected,
    model_folder,
    opened,
    read_settings,
    trained_length,
)

__all__ = [
    "FORMATS",
    "RUN_CHECKPOINTS",
    "RUN_CLAIM",
    "RUN_MODEL",
    "Format",
    "config_from_published",
    "detected",
    "from_published",
    "load_published",
    "model_folder",
    "opened",
    "published_names",
    "read_settings",
    "trained_length",
]
