"""The folder of a run: whose it is, and whether the run is complete."""

import json
import os
from pathlib import Path
from typing import Any

from mor_layers import from_mapping, to_mapping
from mor_layers.routers import registry
from mor_megatron.checkpoints import runs
from mor_tools.formats import RUN_CHECKPOINTS, RUN_CLAIM
from mor_tools.pretraining.data.text import PreparedText
from mor_tools.pretraining.settings import Settings

FREE_TO_CHANGE = (
    "output",
    "log_every",
    "peak_tflops",
    "evaluation",
    "wandb",
    "parallel",
    "training.stop_after",
    "training.micro_batch_size",
    "training.recompute",
    "training.checkpoint_every",
    "training.timeout_seconds",
    "data.prepared_folder",
    "data.workers",
)
"""Settings that do not change what a run computes, beyond rounding."""


def is_complete(settings: Settings) -> bool:
    """Whether the run in this folder took all its steps and was summed up.

    Raises:
        ValueError: it is a run with other settings.
    """
    folder = Path(settings.output)
    claimed = folder / RUN_CLAIM
    if claimed.exists():
        _check_same(folder, json.loads(claimed.read_text("utf-8"))["settings"], settings)
    done = runs.latest_step(folder / RUN_CHECKPOINTS) == settings.training.steps
    return done and (folder / "summary.json").exists()


def has_checkpoint(settings: Settings) -> bool:
    """Whether a run would go on from a checkpoint."""
    return runs.latest_step(Path(settings.output) / RUN_CHECKPOINTS) is not None


def claim(settings: Settings, text: PreparedText) -> None:
    """Note in the folder which settings and which text its run has.

    Raises:
        ValueError: the folder has a run on other text.
    """
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    claimed = folder / RUN_CLAIM
    if not claimed.exists():
        claim = {"text": str(text.prefix), "settings": to_mapping(settings)}
        write_atomically(claimed, json.dumps(claim, indent=2) + "\n")
        return
    earlier = json.loads(claimed.read_text("utf-8"))["text"]
    if Path(earlier).parts[-2:] != text.prefix.parts[-2:]:
        raise ValueError(
            f"{folder} has a run on other text ({earlier}, now {text.prefix}). Choose another "
            "output=, or remove the folder."
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either whole or not there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


def _check_same(folder: Path, earlier: dict[str, Any], settings: Settings) -> None:
    # Read like any other, so that settings newer than the run have their defaults. The folder may
    # name the router that the user names too, whose module is imported already, and no other.
    where, recursion = str(folder / RUN_CLAIM), settings.recursion
    own = None if recursion is None else registry.router_name(recursion.router)
    names_own = _flat(earlier).get("recursion.router.type") == own
    before = _flat(to_mapping(from_mapping(Settings, earlier, where, may_import=names_own)))
    now = _flat(to_mapping(settings))
    differences = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name) and not name.startswith(FREE_TO_CHANGE)
    ]
    if differences:
        raise ValueError(
            f"{folder} has a run with other settings: {'; '.join(differences)}. Choose another "
            "output=, or remove the folder to start over."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
