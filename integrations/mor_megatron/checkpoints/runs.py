"""Checkpoints of training runs, which can be saved in one parallel layout and loaded in another.

A checkpoint is a directory `step_<n>` in Megatron's `torch_dist` format: tensors by global name and
index, and the state that all ranks share. The directory gets its name only when it is complete,
including checksums (see `integrity`). Only after that, the file `latest` is updated. After a crash
between these two steps, a complete checkpoint may be newer than the one that `latest` names. In this
case the newer one is loaded. A damaged checkpoint is reported, and the newest valid one before it is
loaded instead.
"""

import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    apply_factories,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import MegatronModule
from megatron.core.utils import unwrap_model
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from mor_megatron.checkpoints import integrity
from mor_megatron.checkpoints.optimizer import load_state, sharded_state, shared_state
from mor_megatron.checkpoints.reader import restricted_reading
from mor_megatron.checkpoints.writer import write_state
from mor_megatron.platform import on_first_rank

_LATEST = "latest"
_MOST_DIFFERENCES_SHOWN = 8


@dataclass(frozen=True)
class Restored:
    """The result of `load`, in addition to the state that it restored."""

    step: int
    """The training step at which the checkpoint was saved."""
    extra: dict[str, Any]
    """The `extra` that was passed to `save`."""
    refused: tuple[str, ...] = ()
    """For each newer checkpoint that is damaged, a message that says what is wrong with it."""
    unsealed: Path | None = None
    """The checkpoint if it has no manifest, so that its tensors could not be verified. Otherwise
    None."""


def save(
    directory: str | Path,
    step: int,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Save a checkpoint. All ranks must call it.

    An existing checkpoint of the same step is replaced.

    Args:
        directory: the directory for all checkpoints of a training run, shared by all ranks.
        step: number of training steps taken.
        chunks: the model chunks of this rank, wrapped or not.
        optimizer: an optimizer from `get_megatron_optimizer` that uses Adam.
        scheduler: Megatron's scheduler of the learning rate and the weight decay.
        extra: a few plain values and tensors, the same on every rank (consumed samples, ...).

    Returns:
        The directory of the checkpoint.

    Raises:
        OSError: the checkpoint cannot be written, for example because the disk is full. Raised on
            every rank. The incomplete checkpoint is removed, and earlier ones are unchanged.
    """
    state = state_to_save(step, chunks, optimizer, scheduler, extra)
    unfinished = Unfinished(directory, step)
    with unfinished.removed_on_error():
        write_state(state, unfinished.partial)
        unfinished.publish()
    return unfinished.target


def state_to_save(
    step: int,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    extra: dict[str, Any] | None,
) -> ShardedStateDict:
    """This rank's part of a checkpoint. The arguments are those of `save`."""
    state: ShardedStateDict = {
        "step": step,
        "extra": extra or {},
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "model": _model_state(chunks),
    }
    if optimizer is not None:
        state["optimizer"] = sharded_state(optimizer, state["model"], False)
        state["shared_optimizer"] = shared_state(optimizer)
    return state


class Unfinished:
    """A checkpoint that is being written, in a folder that is still without its name.

    All ranks must construct it and call its methods.

    Raises:
        OSError: the folder cannot be created. Raised on every rank.
    """

    def __init__(self, directory: str | Path, step: int) -> None:
        self.target = folder_of(directory, step)
        self.partial = self.target.with_name(f".{self.target.name}.partial")
        with self.removed_on_error():
            on_first_rank(lambda: _make_empty(self.partial))

    def publish(self) -> None:
        """Seal the folder, and give it its name."""
        integrity.seal(self.partial)
        on_first_rank(lambda: _publish(self.partial, self.target))

    @contextmanager
    def removed_on_error(self) -> Iterator[None]:
        """A context that removes the folder if an OSError is raised on every rank, and explains it."""
        try:
            yield
        except OSError as error:
            told = on_first_rank(lambda: _given_up(self.partial, self.target, error))
            raise OSError(told) from error


def load(
    directory: str | Path,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    step: int | None = None,
) -> Restored:
    """Load the state of a checkpoint that was saved in any parallel layout. All ranks must call it.

    Hyperparameters such as learning rate, betas and weight decay are those of this run's
    configuration. The scheduler resumes at its saved step.

    Args:
        directory: as for `save`.
        chunks: the model chunks of this rank, wrapped or not.
        optimizer: restored as well, if given. The checkpoint must contain an optimizer.
        scheduler: restored as well, if given. The checkpoint must contain a scheduler.
        step: the step of the checkpoint. Default: the latest valid checkpoint.

    Raises:
        FileNotFoundError: there is no complete checkpoint, or none of this step.
        ValueError: the checkpoint is damaged (if `step` is None, all of them are), does not fit the
            model, or does not contain the optimizer or the scheduler.
    """
    source, refused = _good(on_first_rank(lambda: _find(Path(directory), step)))
    with restricted_reading():
        shared = dist_checkpointing.load_common_state_dict(source)
    if optimizer is not None and "shared_optimizer" not in shared:
        raise ValueError(f"{source} was saved without an optimizer. Load it with optimizer=None.")
    if scheduler is not None and shared["scheduler"] is None:
        raise ValueError(f"{source} was saved without a scheduler. Load it with scheduler=None.")
    request: ShardedStateDict = {"model": _model_state(chunks)}
    if optimizer is not None:
        request["optimizer"] = sharded_state(optimizer, request["model"], True)
    _check_fit(source, request)
    state = _read(source, request)
    for index, chunk in enumerate(chunks):
        # A chunk that uses the layers of another has no weights of its own, and so no entry.
        _unwrapped(chunk).load_state_dict(state["model"].get(f"chunk_{index}", {}))
    if optimizer is not None:
        load_state(optimizer, state["optimizer"], state["shared_optimizer"])
    if scheduler is not None:
        scheduler.num_steps = 0  # loading adds the saved number of steps to this
        scheduler.load_state_dict(state["scheduler"])
    unsealed = on_first_rank(lambda: not (source / integrity.MANIFEST).is_file())
    return Restored(state["step"], state["extra"], refused, source if unsealed else None)


def folder_of(directory: str | Path, step: int) -> Path:
    """The folder for the checkpoint of a step, whether or not it exists."""
    return Path(directory, f"step_{step:08d}")


def latest_step(directory: str | Path) -> int | None:
    """The step of the newest complete checkpoint, or None if there is none."""
    candidates = _newest_first(Path(directory))
    return _step(candidates[0]) if candidates else None


def steps(directory: str | Path) -> list[int]:
    """The steps of all checkpoints that may be loaded, in ascending order."""
    return sorted(_step(folder) for folder in _newest_first(Path(directory)))


def rewind(directory: str | Path, step: int, aside: str) -> Path | None:
    """Make the checkpoint of a step the newest one; later ones are moved aside, not removed.

    Call it on one rank, when no other process uses the directory. If it is interrupted, the
    remaining checkpoints are still usable, and it can be called again.

    Args:
        directory: as for `save`.
        step: the step of a complete checkpoint.
        aside: name of the folder in `directory` to which the later checkpoints are moved.

    Returns:
        That folder, or None if there were no later checkpoints.

    Raises:
        OSError: a checkpoint cannot be moved.
    """
    place = Path(directory)
    later = [folder for folder in _newest_first(place) if _step(folder) > step]
    _point_to(folder_of(place, step))
    for folder in later:  # newest first, so that an interruption leaves no gap
        target = place / aside / folder.name
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)  # left by an earlier rewind to the same step
        folder.rename(target)
    return place / aside if later else None


def put_in_order(directory: str | Path) -> tuple[str, ...]:
    """Clean up after a save that was killed. Returns a message for each action.

    Call it on one rank, when no other process can be saving into the directory.

    Raises:
        OSError: a folder cannot be moved or removed.
    """
    done = []
    for left in sorted(Path(directory).glob(".step_*")):
        name = re.fullmatch(r"\.(step_\d+)\.(partial|replaced)", left.name)
        if name is None:
            continue
        target = left.with_name(name[1])
        # The save was replacing a checkpoint of the same step, and was killed between its two renames.
        if name[2] == "replaced" and not target.exists():
            left.rename(target)
            done.append(f"{target} was restored; a save that did not finish had renamed it.")
            continue
        shutil.rmtree(left)
        done.append(f"{left} was removed; a save that did not finish had left it behind.")
    return tuple(done)


def _unwrapped(chunk: nn.Module) -> MegatronModule:
    module: Any = unwrap_model(chunk)
    return module


def _model_state(chunks: Sequence[nn.Module]) -> ShardedStateDict:
    # Megatron modifies the metadata, so each call gets its own dict.
    return {
        f"chunk_{index}": _unwrapped(chunk).sharded_state_dict(
            metadata={"non_homogeneous_layers": True}
        )
        for index, chunk in enumerate(chunks)
    }


def _given_up(partial: Path, target: Path, error: OSError) -> str:
    """Remove an incomplete checkpoint. Returns the error message."""
    size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    shutil.rmtree(partial, ignore_errors=True)
    try:
        free = f"{shutil.disk_usage(target.parent).free / 1e9:.1f} GB are free"
    except OSError:
        free = "the folder does not exist"
    earlier = _newest_first(target.parent)
    kept = "There is no earlier checkpoint."
    if earlier:
        kept = (
            f"The last complete one, {earlier[0].name}, is unchanged; run again to resume from it."
        )
    return (
        f"checkpoint {target.name} could not be written into {target.parent}: {error}. "
        f"The {size / 1e9:.1f} GB written so far were removed; {free} now. {kept}"
    )


def _make_empty(directory: Path) -> None:
    if directory.exists():  # this process cannot know whether another one is still writing it
        warnings.warn(
            f"{directory} already exists, because another save was killed or is still running. It "
            "is removed. Make sure that only one run saves into the folder.",
            stacklevel=2,
        )
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _publish(partial: Path, target: Path) -> None:
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():  # keep the old checkpoint under another name until the new one is in place
        target.rename(replaced)
    partial.rename(target)
    _point_to(target)
    shutil.rmtree(replaced, ignore_errors=True)


def _point_to(target: Path) -> None:
    """Let `latest` name a checkpoint."""
    pointer = target.with_name(f".{_LATEST}.partial")
    pointer.write_text(target.name)
    os.replace(pointer, target.with_name(_LATEST))


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _newest_first(directory: Path) -> list[Path]:
    """The complete checkpoints, newest first. If `latest` names none, all folders of checkpoints."""
    found = [p for p in directory.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    pointer = directory / _LATEST
    # After a crash or on a damaged disk, the file may contain arbitrary bytes instead of a name.
    named = pointer.read_bytes().decode("utf-8", "replace").strip() if pointer.is_file() else ""
    if re.fullmatch(r"step_\d+", named):
        newest = directory / named
        # A save that was killed just before it wrote `latest` left a newer checkpoint that is
        # complete and has a manifest. A newer folder without a manifest may be incomplete.
        found = [
            newest,
            *(p for p in found if _step(p) < _step(newest)),
            *(p for p in found if _step(p) > _step(newest) and (p / integrity.MANIFEST).is_file()),
        ]
    return sorted(found, key=_step, reverse=True)


def _find(directory: Path, step: int | None) -> list[Path]:
    """The checkpoint of a step, or all candidates from the best one on."""
    if step is None:
        candidates = _newest_first(directory)
        if not candidates:
            raise FileNotFoundError(f"there is no complete checkpoint in {directory}")
        return candidates
    source = folder_of(directory, step)
    if not source.is_dir():
        complete = sorted(path.name for path in directory.glob("step_*"))
        raise FileNotFoundError(f"there is no {source.name} in {directory}, only {complete}.")
    return [source]


def _good(candidates: list[Path]) -> tuple[Path, tuple[str, ...]]:
    """The first valid candidate, and what is wrong with those before it."""
    refused = []
    for source in candidates:
        damage = integrity.damage(source)
        if damage is None:
            return source, tuple(refused)
        refused.append(f"{source} is damaged: {damage}")
    raise ValueError(
        f"{'; '.join(refused)}. There is no valid checkpoint to load instead. Restore one from a "
        "copy, or start over in another folder."
    )


def _read(source: Path, request: ShardedStateDict) -> Any:
    """Read the requested state. If a rank cannot read its part, all ranks raise."""
    state = problem = None
    try:
        with restricted_reading():
            state = dist_checkpointing.load(request, str(source))
    except CheckpointException as error:  # a BaseException whose message hides the cause
        problem = "; ".join(str(cause[0]) for cause in error.failures.values())
    problems: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise ValueError(f"{source} cannot be read. Rank {rank}: {found}")
    return state


def _check_fit(source: Path, request: ShardedStateDict) -> None:
    """Compare names and shapes of all ranks before loading, so that either all ranks raise or none."""
    wanted: dict[str, tuple[int, ...] | None] = {}
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, _shapes(request))
    for shapes in gathered:
        wanted |= shapes
    with restricted_reading():
        stored = dist_checkpointing.load_tensors_metadata(str(source))
    has_optimizer = any(name.startswith("optimizer.") for name in wanted)
    differences = [
        f"{name} has shape {shape}, but {stored[name].global_shape} in the checkpoint"
        if name in stored
        else f"{name} is not in the checkpoint"
        for name, shape in wanted.items()
        if name not in stored or shape not in (None, stored[name].global_shape)
    ]
    differences += [
        f"{name} is not in the model"
        for name in stored
        if name not in wanted and (has_optimizer or not name.startswith("optimizer."))
    ]
    if differences:
        shown = "\n  ".join(differences[:_MOST_DIFFERENCES_SHOWN])
        raise ValueError(
            f"{source} does not fit the model; {len(differences)} tensors differ:\n  {shown}"
        )


def _shapes(request: ShardedStateDict) -> dict[str, tuple[int, ...] | None]:
    """Global shapes by name. None for a tensor that Megatron pads, which may have any shape."""
    built: Any = dict_list_map_outplace(
        lambda leaf: leaf, request
    )  # factories are applied in place
    apply_factories(built)
    return {
        leaf.key: None if leaf.allow_shape_mismatch else leaf.global_shape
        for leaf in nested_values(built)
        if isinstance(leaf, ShardedTensor)
    }
