"""Checkpoints that any layout of ranks can save and any other can load.

A checkpoint is a directory `step_<n>` in Megatron's `torch_dist` format: tensors by global name and
index, and what all ranks share. It appears under that name only when it is complete, checksums
included (`integrity`), and the file `latest` names the newest one only after that. So after a crash
between the two a complete checkpoint may be newer than the one that `latest` names, and it is taken.
One that turns out damaged is refused by name, and the newest good one before it is taken.
"""

import os
import re
import shutil
import warnings
from collections.abc import Sequence
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
    """What `load` found besides the state that it put back in place."""

    step: int
    """The training step at which the checkpoint was saved."""
    extra: dict[str, Any]
    """What was passed to `save`."""
    refused: tuple[str, ...] = ()
    """Newer checkpoints that are damaged, and what is wrong with each."""
    unsealed: Path | None = None
    """The checkpoint itself where it has no manifest, so that nothing tells whether its tensors are
    what was written; else None."""


def save(
    directory: str | Path,
    step: int,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Saves a checkpoint. All ranks call it.

    A checkpoint of the same step is replaced.

    Args:
        directory: holds the checkpoints of one training run; shared by all ranks.
        step: training steps taken.
        chunks: this rank's model chunks, bare or wrapped.
        optimizer: from `get_megatron_optimizer`, with Adam inside.
        scheduler: Megatron's schedule of the learning rate and the weight decay.
        extra: a few plain values and tensors, the same on every rank (consumed samples, ...).

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: it cannot be written, as on a full disk; on every rank. Nothing is left of it, and
            earlier checkpoints are as they were.
    """
    target = folder_of(directory, step)
    partial = target.with_name(f".{target.name}.partial")
    state: ShardedStateDict = {
        "step": step,
        "extra": extra or {},
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "model": _model_state(chunks),
    }
    if optimizer is not None:
        state["optimizer"] = sharded_state(optimizer, state["model"], False)
        state["shared_optimizer"] = shared_state(optimizer)
    try:
        on_first_rank(lambda: _make_empty(partial))
        write_state(state, partial)
        integrity.seal(partial)
        on_first_rank(lambda: _publish(partial, target))
    except OSError as error:
        raise OSError(on_first_rank(lambda: _given_up(partial, target, error))) from error
    return target


def load(
    directory: str | Path,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    step: int | None = None,
) -> Restored:
    """Puts a checkpoint's state in place, whatever layout saved it. All ranks call it.

    Learning rate, betas, weight decay and the like are those of this run's configuration; a
    scheduler continues where it was.

    Args:
        directory: as for `save`.
        chunks: this rank's model chunks, bare or wrapped.
        optimizer: to be restored too, if given. The checkpoint must hold one.
        scheduler: to be restored too, if given. The checkpoint must hold one.
        step: which checkpoint; the latest if None.

    Raises:
        FileNotFoundError: there is no such complete checkpoint.
        ValueError: it is damaged, and so are all before it where `step` is None; it does not fit the
            model, or lacks the optimizer or the scheduler.
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
        # A chunk that uses another's layers has nothing of its own, and then no entry.
        _unwrapped(chunk).load_state_dict(state["model"].get(f"chunk_{index}", {}))
    if optimizer is not None:
        load_state(optimizer, state["optimizer"], state["shared_optimizer"])
    if scheduler is not None:
        scheduler.num_steps = 0  # loading counts on from here
        scheduler.load_state_dict(state["scheduler"])
    unsealed = on_first_rank(lambda: not (source / integrity.MANIFEST).is_file())
    return Restored(state["step"], state["extra"], refused, source if unsealed else None)


def folder_of(directory: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or would."""
    return Path(directory, f"step_{step:08d}")


def latest_step(directory: str | Path) -> int | None:
    """The step of the newest complete checkpoint, or None where there is none."""
    candidates = _newest_first(Path(directory))
    return _step(candidates[0]) if candidates else None


def steps(directory: str | Path) -> list[int]:
    """The steps of all checkpoints that may be loaded, in ascending order."""
    return sorted(_step(folder) for folder in _newest_first(Path(directory)))


def rewind(directory: str | Path, step: int, aside: str) -> Path | None:
    """Makes the checkpoint of a step the newest one; later ones are moved aside, and none removed.

    Call it on one rank, at a moment when no other process uses the directory. If it is interrupted,
    the checkpoints that are left are in order, and it can be called again.

    Args:
        directory: as for `save`.
        step: of a complete checkpoint.
        aside: name of the folder in `directory` that the later checkpoints are moved to.

    Returns:
        That folder; None where there were no later checkpoints.

    Raises:
        OSError: something cannot be moved.
    """
    place = Path(directory)
    later = [folder for folder in _newest_first(place) if _step(folder) > step]
    _point_to(folder_of(place, step))
    for folder in later:  # the newest first, so that what is left never has a gap
        target = place / aside / folder.name
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)  # of an earlier rewind to the same place
        folder.rename(target)
    return place / aside if later else None


def put_in_order(directory: str | Path) -> tuple[str, ...]:
    """Clears up what a save that was killed left behind; what was done, in sentences.

    Call it on one rank, at a moment when no other process can be saving into the directory.

    Raises:
        OSError: something cannot be moved or removed.
    """
    done = []
    for left in sorted(Path(directory).glob(".step_*")):
        name = re.fullmatch(r"\.(step_\d+)\.(partial|replaced)", left.name)
        if name is None:
            continue
        target = left.with_name(name[1])
        # Killed between the two renames of a save that replaces a checkpoint of the same step.
        if name[2] == "replaced" and not target.exists():
            left.rename(target)
            done.append(f"{target} had been moved aside by a save that did not finish; it is back.")
            continue
        shutil.rmtree(left)
        done.append(f"{left}, which a save that did not finish left behind, was removed.")
    return tuple(done)


def _unwrapped(chunk: nn.Module) -> MegatronModule:
    module: Any = unwrap_model(chunk)
    return module


def _model_state(chunks: Sequence[nn.Module]) -> ShardedStateDict:
    # Megatron adds to the metadata, so each call takes its own.
    return {
        f"chunk_{index}": _unwrapped(chunk).sharded_state_dict(
            metadata={"non_homogeneous_layers": True}
        )
        for index, chunk in enumerate(chunks)
    }


def _given_up(partial: Path, target: Path, error: OSError) -> str:
    """Remove what was written of a checkpoint; what to tell."""
    size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    shutil.rmtree(partial, ignore_errors=True)
    try:
        free = f"{shutil.disk_usage(target.parent).free / 1e9:.1f} GB are free"
    except OSError:
        free = "the folder is not there"
    earlier = _newest_first(target.parent)
    kept = "There is no earlier one."
    if earlier:
        kept = f"The last good one, {earlier[0].name}, is as it was; run again to go on from it."
    return (
        f"checkpoint {target.name} could not be written into {target.parent}: {error}. "
        f"{size / 1e9:.1f} GB of it were written and are removed again, {free} now. {kept}"
    )


def _make_empty(directory: Path) -> None:
    if directory.exists():  # who killed it, or writes it still, is not known here
        warnings.warn(
            f"{directory} is there already: another save was killed, or still runs. It is removed. "
            "Make sure that only one run saves into the folder.",
            stacklevel=2,
        )
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _publish(partial: Path, target: Path) -> None:
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():  # it survives under the other name until the new one is in place
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
    """Checkpoints from the newest complete one back; all, where `latest` names none."""
    found = [p for p in directory.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    pointer = directory / _LATEST
    # A crash or a damaged disk may leave anything in the file, which is then no name.
    named = pointer.read_bytes().decode("utf-8", "replace").strip() if pointer.is_file() else ""
    if re.fullmatch(r"step_\d+", named):
        newest = directory / named
        # A save that was killed just before it wrote `latest` left a newer checkpoint that is whole,
        # and so has a manifest. Without one, a newer folder is not known to be complete.
        found = [
            newest,
            *(p for p in found if _step(p) < _step(newest)),
            *(p for p in found if _step(p) > _step(newest) and (p / integrity.MANIFEST).is_file()),
        ]
    return sorted(found, key=_step, reverse=True)


def _find(directory: Path, step: int | None) -> list[Path]:
    """The checkpoint asked for; or all that may be taken, the best one first."""
    if step is None:
        candidates = _newest_first(directory)
        if not candidates:
            raise FileNotFoundError(f"there is no complete checkpoint in {directory}")
        return candidates
    source = folder_of(directory, step)
    if not source.is_dir():
        complete = sorted(path.name for path in directory.glob("step_*"))
        raise FileNotFoundError(f"there is no {source.name} in {directory}, only {complete}")
    return [source]


def _good(candidates: list[Path]) -> tuple[Path, tuple[str, ...]]:
    """The first candidate that is whole, and what is wrong with those before it."""
    refused = []
    for source in candidates:
        damage = integrity.damage(source)
        if damage is None:
            return source, tuple(refused)
        refused.append(f"{source} is damaged: {damage}")
    raise ValueError(
        f"{'; '.join(refused)}. No checkpoint is left to take instead. Bring one back from a copy, "
        "or start over in another folder."
    )


def _read(source: Path, request: ShardedStateDict) -> Any:
    """The requested state; where a rank cannot read its part, all of them raise."""
    problem = None
    try:
        with restricted_reading():
            state = dist_checkpointing.load(request, str(source))
    except CheckpointException as error:  # no Exception, and it hides what was wrong
        problem = "; ".join(str(cause[0]) for cause in error.failures.values())
    problems: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise ValueError(f"{source} cannot be read. Rank {rank}: {found}")
    return state


def _check_fit(source: Path, request: ShardedStateDict) -> None:
    """Compares names and shapes over all ranks first, so that all of them raise, or none."""
    wanted: dict[str, tuple[int, ...] | None] = {}
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, _shapes(request))
    for shapes in gathered:
        wanted |= shapes
    with restricted_reading():
        stored = dist_checkpointing.load_tensors_metadata(str(source))
    has_optimizer = any(name.startswith("optimizer.") for name in wanted)
    differences = [
        f"{name} is {shape}, but the checkpoint holds {stored[name].global_shape}"
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
    """Global shapes by name; None where Megatron pads (the vocabulary) and any shape will do."""
    built: Any = dict_list_map_outplace(
        lambda leaf: leaf, request
    )  # factories are applied in place
    apply_factories(built)
    return {
        leaf.key: None if leaf.allow_shape_mismatch else leaf.global_shape
        for leaf in nested_values(built)
        if isinstance(leaf, ShardedTensor)
    }
