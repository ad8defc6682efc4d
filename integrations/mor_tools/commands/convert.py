"""Convert models between Hugging Face, ours, published MoR and Megatron; make dense ones recursive.

    mor convert llama/ recursive/ --recursions 3 --init average
    mor convert llama/ recursive/ --recursions 2 --prelude 3 --coda 3
    mor convert llama/ looped/ --recursions 2 --repeat --prelude 8 --coda 12
    mor convert recursive/ checkpoints/ --to megatron
    mor convert runs/tiny/ model/
    mor convert recursive/ unrolled/ --to llama

What the source is shows in its files. Afterwards both sides are opened and compared.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mor_layers import RecursionConfig, from_mapping
from mor_layers.recursion import SHARING_SCHEMES
from mor_layers.routers import DampedLoops
from mor_layers.weights import (
    MODEL_TYPE,
    StoredModel,
    looped_weights,
    read_config,
    recursive_weights,
    written_whole,
)
from mor_tools import terminal
from mor_tools.commands import verification
from mor_tools.commands.command_line import WITH_RECURSIONS, flag
from mor_tools.formats import FORMATS, Format, detected, read_settings


def run(options: argparse.Namespace) -> None:
    """Convert a model.

    Raises:
        ValueError: a file is damaged or does not match the settings, the target format cannot
            express the model, or the written model computes something else.
        OSError: a folder does not exist or cannot be written.
    """
    if options.target.exists():
        raise ValueError(f"{options.target} already exists. Name a new folder, or remove it.")
    given = [name for name in WITH_RECURSIONS if getattr(options, name) is not None]
    if given and options.recursions is None:
        raise ValueError(
            f"{flag(given[0])} has no effect without --recursions. Leave it out, or give the "
            "number of recursions."
        )
    source, target = detected(options.source), FORMATS[options.to]
    if options.settings is not None and not source.takes_settings:
        raise ValueError(
            f"--settings has no effect: {options.source} is in format {source.name!r}, which "
            "contains its settings. Leave it out."
        )
    model = original = source.open(
        options.source, read_settings(options.settings), options.trust_remote_code
    )
    if options.recursions is not None:
        model = _looped(model, options) if options.repeat else _recursive(model, options)
    target.require_place(model.config)
    console = Console(stderr=True)
    with written_whole(options.target) as partial:
        with Progress(console=console) as progress:
            task = progress.add_task(f"writing {options.target}", total=len(model.weights))
            target.write(model, partial, lambda _: progress.advance(task))
            done = progress.tasks[0].completed  # formats may fuse or repeat tensors
            progress.update(task, total=done, completed=done)
        if options.verify:
            by_library = source if model is original else FORMATS[MODEL_TYPE]
            with terminal.working("comparing both sides"):
                largest = _difference(by_library, options.source, model, target, partial)
            console.print(f"largest difference of logits: {largest:.2g}")


def _difference(
    source: Format, folder: Path, model: StoredModel, target: Format, written: Path
) -> float:
    """Largest difference between the logits of the model that was read and of the one that was
    written.

    Raises:
        ValueError: it is larger than rounding errors.
    """
    ids = verification.probe(model.config.vocab_size)
    # For quantized weights, transformers needs the kernels of a GPU, which also round activations.
    is_quantized = source.has_public_model and "quantization_config" in read_config(folder)
    if source.has_public_model and not is_quantized:
        expected = verification.logits_by_transformers(folder, ids)
    else:
        expected = verification.logits_of(model, ids)
    if target.has_public_model:
        found = verification.logits_by_transformers(written, ids)
    else:
        # The written model names no other module than the source did, so it is trusted as the
        # source is.
        found = verification.logits_of(target.open(written, None, True), ids)
    return verification.difference(expected, found)


def _recursive(model: StoredModel, options: argparse.Namespace) -> StoredModel:
    if options.damping is not None:
        raise ValueError(
            "--damping has no effect without --repeat. Leave it out, or repeat layers."
        )
    if options.relax_rank is None and options.relax_kind is not None:
        raise ValueError(
            "--relax-kind has no effect without --relax-rank. Leave it out, or give the rank."
        )
    values: dict[str, Any] = {
        "num_recursions": options.recursions,
        "sharing": options.sharing or "middle_cycle",
        "router": {"type": options.router or "fixed_depth"},
        "prelude_layers": options.prelude,
        "coda_layers": options.coda,
    }
    if options.relax_rank is not None:
        kind = options.relax_kind or "lora"
        values["relaxation"] = {"rank": options.relax_rank, "kind": kind}
        values["share_norms"] = False  # each step starts with the norms of the layers at its depth
    if options.own_per_step is not None:
        values["own_per_step"] = options.own_per_step
        values["share_norms"] = False
    recursion = from_mapping(RecursionConfig, values, "recursion", may_import=True)
    if model.config.recursion is None:  # otherwise the check below names what would fit
        _require_division(recursion, model.config.num_unrolled_layers)
    config, weights = recursive_weights(
        model.weights, model.config, recursion, options.init or "average", options.seed or 0
    )
    return StoredModel(config, weights, model.facts, model.side_files)


def _looped(model: StoredModel, options: argparse.Namespace) -> StoredModel:
    """The model with its middle layers repeated as they are."""
    for name in ("init", "seed", "relax_rank", "relax_kind", "own_per_step", "router"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"{flag(name)} has no effect with --repeat, which changes no weights and takes no "
                "router. Leave it out."
            )
    recursion = RecursionConfig(
        options.recursions,
        sharing=options.sharing or "middle_cycle",
        router=DampedLoops(options.damping),
        prelude_layers=options.prelude,
        coda_layers=options.coda,
    )
    config, weights = looped_weights(model.weights, model.config, recursion)
    return StoredModel(config, weights, model.facts, model.side_files)


def _require_division(recursion: RecursionConfig, layers: int) -> None:
    """Refuse a number of recursions that the model's layers cannot be divided into, and list those
    they can.

    The model is given, so the usual advice to change the number of layers would not help.
    """
    if _divides(recursion, layers):
        return
    possible = {
        sharing: [n for n in range(2, layers + 1) if _divides(recursion, layers, n, sharing)]
        for sharing in SHARING_SCHEMES
    }
    shown = "; ".join(
        f"--sharing {sharing}: {', '.join(map(str, numbers))}"
        for sharing, numbers in possible.items()
        if numbers
    )
    raise ValueError(
        f"the model's {layers} layers cannot be divided into --recursions "
        f"{recursion.num_recursions} with --sharing {recursion.sharing}. "
        + (f"Use one of these numbers: {shown}." if shown else "No sharing scheme divides them.")
    )


def _divides(
    recursion: RecursionConfig, layers: int, number: int | None = None, sharing: str | None = None
) -> bool:
    """Whether the layers can be divided into this recursion, with another number or scheme if
    given.
    """
    changes: dict[str, Any] = {}
    if number is not None:
        changes = {"num_recursions": number, "sharing": sharing}
    try:
        replace(recursion, **changes).schedule(layers)
    except ValueError:
        return False
    return True
