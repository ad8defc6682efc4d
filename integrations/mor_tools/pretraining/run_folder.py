"""The folder of a run: which run it belongs to, and whether that run is complete."""

import json
import os
import tempfile
from dataclasses import dataclass
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
    "training.checkpoint_in_background",
    "training.timeout_seconds",
    "data.prepared_folder",
    "data.workers",
)
"""Settings that do not change what a run computes, apart from rounding."""
OF_THE_END = ("training.steps", "training.decay_steps")
"""Settings that determine when a run ends; they may change when the run is extended."""


def is_complete(settings: Settings) -> bool:
    """Whether the run in this folder has taken all its steps and written its summary.

    A run that the settings extend is not complete.

    Raises:
        ValueError: the folder holds a run with other settings, or its run.json is damaged.
    """
    folder = Path(settings.output)
    earlier = _claimed(folder)
    if earlier is not None:
        _check_same(folder, earlier["settings"], settings)
    done = runs.latest_step(folder / RUN_CHECKPOINTS) == settings.training.steps
    return done and (folder / "summary.json").exists()


def has_checkpoint(settings: Settings) -> bool:
    """Whether a run would resume from a checkpoint."""
    return runs.latest_step(Path(settings.output) / RUN_CHECKPOINTS) is not None


def claim(settings: Settings, text: PreparedText) -> None:
    """Record the run's settings and text in the folder.

    Raises:
        ValueError: the folder holds a run on other text, or its run.json is damaged.
    """
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    found = _claimed(folder)
    if found is None:
        claim = {"text": str(text.prefix), "settings": to_mapping(settings)}
        write_atomically(folder / RUN_CLAIM, json.dumps(claim, indent=2) + "\n")
        return
    earlier = found["text"]
    if Path(earlier).parts[-2:] != text.prefix.parts[-2:]:
        raise ValueError(
            f"{folder} holds a run on other text ({earlier}, now {text.prefix}). Choose another "
            "output=, or remove the folder."
        )


@dataclass(frozen=True)
class Extension:
    """A run that gets more steps than were planned."""

    planned_steps: int
    """Number of steps planned before."""
    told: str
    """What was done, as sentences for the user."""


def extend(settings: Settings) -> Extension | None:
    """Prepare a run for more steps than were planned; None if the number has not changed.

    The stable phase of the schedule is the same whatever its length. A run whose learning rate
    already decays can therefore return to its last checkpoint before the decay, and continue as if
    the larger number of steps had been planned from the start. Later checkpoints are moved aside.
    The caller must hold the folder's lock.

    Raises:
        ValueError: the new decay would begin before the checkpoint that training resumes from.
        OSError: checkpoints cannot be moved.
    """
    folder, training = Path(settings.output), settings.training
    found = _claimed(folder)
    assert found is not None  # `claim` wrote it
    before = found["settings"]["training"]
    planned, decay_steps = before["steps"], before["decay_steps"]
    if planned == training.steps:
        return None
    checkpoints = folder / RUN_CHECKPOINTS
    there = runs.steps(checkpoints)
    stable = [step for step in there if step <= planned - decay_steps]
    start = max(stable, default=there[-1] if there else 0)
    if start > training.decay_start:
        raise ValueError(
            f"training.decay_steps={training.decay_steps} of training.steps={training.steps} would "
            f"begin after step {training.decay_start}, but {folder} resumes from step {start}. Use "
            f"at most decay_steps={training.steps - start}, or more steps."
        )
    told = f"extended from {planned} to {training.steps} steps: {_way_on(there, stable)}"
    if stable:
        aside = runs.rewind(checkpoints, start, f"of_{planned}_steps")
        if aside is not None:
            told += f" The later checkpoints were moved to {aside}."
    before |= {"steps": training.steps, "decay_steps": training.decay_steps}
    extension = {
        "steps": [planned, training.steps],
        "decay_steps": [decay_steps, training.decay_steps],
        "from_step": start,
        "what": told,
    }
    found.setdefault("extensions", []).append(extension)
    write_atomically(folder / RUN_CLAIM, json.dumps(found, indent=2) + "\n")
    return Extension(planned, told)


def _way_on(there: list[int], stable: list[int]) -> str:
    """How an extended run resumes, given its checkpoints and those of them from before the decay."""
    if not there:
        return "there is no checkpoint yet, so it starts from the beginning."
    if there == stable:
        return f"the learning rate has not begun to decay, so it resumes from step {there[-1]}."
    if stable:
        return (
            f"it resumes from step {stable[-1]}, the last checkpoint before the learning rate "
            "decayed, as a run planned longer would have."
        )
    return (
        f"no checkpoint from before the decay is left, so it resumes from step {there[-1]} with "
        "the learning rate raised again. A run planned longer would have other losses."
    )


def put_in_order(settings: Settings) -> tuple[str, ...]:
    """Clean up after a session that was killed while saving; returns what was done, in sentences.

    The caller must hold the folder's lock, so that no other run is saving.

    Raises:
        OSError: the folder of checkpoints cannot be written.
    """
    checkpoints = Path(settings.output) / "checkpoints"
    if not checkpoints.exists():
        return ()
    try:
        with tempfile.TemporaryFile(dir=checkpoints):
            pass
        return runs.put_in_order(checkpoints)
    except OSError as error:
        raise OSError(
            f"{checkpoints} cannot be written: {error}. Choose another output=, or change its "
            "permissions."
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file in such a way that it is either complete or does not exist."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


def _claimed(folder: Path) -> dict[str, Any] | None:
    """What run.json records about the folder's run; None if there is no such file."""
    claimed = folder / RUN_CLAIM
    if not claimed.exists():
        return None
    found: Any = None
    try:
        found = json.loads(claimed.read_text("utf-8"))
        is_whole = isinstance(found["settings"], dict) and isinstance(found["text"], str)
    except (ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise ValueError(
            f"{claimed} is damaged: it does not contain the settings and the text of the run in "
            "this folder. Restore it from a copy, or choose another output=. To continue without "
            "the check that both are unchanged, remove the file."
        )
    return found


def _check_same(folder: Path, earlier: dict[str, Any], settings: Settings) -> None:
    # Read like any other settings, so that those added to the code since have their defaults. The
    # folder may name the routers that the user names too, whose modules are imported already, and no
    # others.
    where = str(folder / RUN_CLAIM)
    own = [registry.router_name(recursion.router) for recursion in settings.recursions]
    named = [value for name, value in _flat(earlier).items() if name.endswith("router.type")]
    names_own = all(name in own for name in named)
    before = _flat(to_mapping(from_mapping(Settings, earlier, where, may_import=names_own)))
    now = _flat(to_mapping(settings))
    free = FREE_TO_CHANGE
    if now["training.steps"] > before["training.steps"]:
        free += OF_THE_END
    differences = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name) and not name.startswith(free)
    ]
    if differences:
        raise ValueError(
            f"{folder} holds a run with other settings: {'; '.join(differences)}. Choose another "
            "output=, or remove the folder to start over. For a branch, with other settings and "
            f"the weights of this run, use output=ANOTHER training.initial_weights={folder}; for a "
            "longer run, use a larger training.steps."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn `{"a": {"b": 1}, "c": [{"d": 2}]}` into `{"a.b": 1, "c.0.d": 2}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            value = {str(index): each for index, each in enumerate(value)}
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
