"""Convert a model between Hugging Face's Llama format and ours, and make it recursive.

    mor convert llama/ recursive/ --recursions 3 --init average
    mor convert recursive/ unrolled/ --to llama

What the source is shows in its files.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mor_huggingface.llama import open_llama, write_llama
from mor_layers import RecursionConfig, from_mapping
from mor_layers.model_folder import (
    MODEL_TYPE,
    StoredModel,
    open_model,
    read_config,
    write_model,
    written_whole,
)
from mor_layers.sharing import SHARING_SCHEMES
from mor_layers.uptraining import INITIALIZATIONS, recursive_weights

Written = Callable[[str], None]


def add_arguments(options: argparse.ArgumentParser) -> None:
    """The command line."""
    add = options.add_argument
    add("source", type=Path, help="folder of a Llama, or of ours")
    add("target", type=Path, help="folder to write; must not exist")
    add("--to", choices=_WRITERS, default=MODEL_TYPE, help="format to write (default: mor)")
    add("--recursions", type=int, help="make a dense model recursive, with so many recursions")
    for name, settings in _WITH_RECURSIONS.items():
        add(f"--{name}", **settings)


def run(options: argparse.Namespace) -> None:
    """Convert.

    Raises:
        ValueError: a file is damaged or does not fit, or the formats cannot say the same.
        OSError: a folder is missing or cannot be written.
    """
    if options.target.exists():
        raise ValueError(f"{options.target} exists. Name a new folder, or remove it.")
    given = [name for name in _WITH_RECURSIONS if getattr(options, name) is not None]
    if given and options.recursions is None:
        raise ValueError(
            f"--{given[0]} has no effect without --recursions. Leave it out, or give their number."
        )
    model = _open(options.source)
    if options.recursions is not None:
        model = _recursive(model, options)
    console = Console(stderr=True)
    with written_whole(options.target) as partial, Progress(console=console) as progress:
        task = progress.add_task(f"writing {options.target}", total=None)
        _WRITERS[options.to](model, partial, lambda _: progress.advance(task))


def _recursive(model: StoredModel, options: argparse.Namespace) -> StoredModel:
    values = {
        "num_recursions": options.recursions,
        "sharing": options.sharing or "middle_cycle",
        "router": {"type": options.router or "fixed_depth"},
    }
    recursion = from_mapping(RecursionConfig, values, "recursion")
    config, weights = recursive_weights(
        model.weights, model.config, recursion, options.init or "average", options.seed or 0
    )
    return StoredModel(config, weights, model.facts, model.side_files)


def _open(folder: Path) -> StoredModel:
    if read_config(folder).get("model_type") == MODEL_TYPE:
        return open_model(folder)
    return open_llama(folder)


_WITH_RECURSIONS: dict[str, dict[str, Any]] = {
    "sharing": {"choices": SHARING_SCHEMES, "help": "sharing scheme (default: middle_cycle)"},
    "init": {
        "choices": INITIALIZATIONS,
        "help": "where shared weights come from (default: average)",
    },
    "router": {"help": "type of the router (default: fixed_depth)"},
    "seed": {"type": int, "help": "of random weights and of a router (default: 0)"},
}
"""Options that only a model made recursive has a use for."""

_WRITERS: dict[str, Callable[[StoredModel, Path, Written], None]] = {
    MODEL_TYPE: write_model,
    "llama": write_llama,
}
