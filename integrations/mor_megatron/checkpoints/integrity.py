"""Verifies that a checkpoint on disk is what was written, by a manifest of sizes and checksums.

`seal` writes `manifest.json` last, so a folder that has one was complete at that time. `damage`
compares the files with it. The files are distributed over the ranks, and each rank reads its files
once to compute a CRC. A folder written by another program has no manifest. In this case the index of
Megatron's `torch_dist` format determines which files it must have, and their smallest possible sizes.
A manifest does not protect against malicious pickles, because their author could have written it too.
Therefore the index and the common state are always required to contain plain values only.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch

from mor_megatron.checkpoints.dist_files import DistTensors, is_dist_checkpoint, read_metadata

MANIFEST = "manifest.json"
_CHUNK = 1 << 24
_MOST_SHOWN = 3


def seal(folder: Path) -> None:
    """Write the manifest of a folder whose files are all written. All ranks must call it.

    Raises:
        OSError: a file cannot be read, or the manifest cannot be written. Raised on every rank.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    found: dict[str, list[int]] = {}
    problem = None
    try:
        for name in _own(names):
            found[name] = [(folder / name).stat().st_size, _checksum(folder / name)]
    except OSError as error:
        problem = error
    raise_together(problem)
    together = {name: value for part in _gathered(found) for name, value in part.items()}
    if torch.distributed.get_rank() == 0:
        try:
            _write_durably(folder / MANIFEST, together)
        except OSError as error:
            problem = error
    raise_together(problem)


def damage(folder: Path) -> str | None:
    """A description of what is wrong with a checkpoint, or None if it is valid.

    All ranks must call it, and get the same result.
    """
    if not folder.is_dir():
        return _first_of("the folder does not exist")
    problems = []
    try:
        wanted = _wanted(folder)
        for name in _own(sorted(wanted)):
            problems += _difference(folder / name, *wanted[name])
    except (OSError, ValueError) as error:
        problems.append(str(error))
    found = _first_of(*problems)
    if found is None:
        found = _first_of(*(_foreign(folder) if torch.distributed.get_rank() == 0 else []))
    return found


def raise_together(error: OSError | None) -> None:
    """If any rank has an error, raise the first one on every rank. All ranks must call it."""
    for rank, found in enumerate(_gathered(error)):
        if found is not None:
            where = "" if str(found).startswith("rank ") else f"rank {rank}: "
            raise OSError(f"{where}{found}")


def _own(names: list[str]) -> list[str]:
    return names[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def _gathered(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def _first_of(*problems: str) -> str | None:
    found = dict.fromkeys(problem for part in _gathered(problems) for problem in part)
    if not found:
        return None
    more = len(found) - _MOST_SHOWN
    return "; ".join([*list(found)[:_MOST_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _wanted(folder: Path) -> dict[str, tuple[int, int | None]]:
    """The size of each required file, and its checksum if it is known.

    Without a manifest the checksums are unknown, and the sizes are lower bounds.

    Raises:
        ValueError: the manifest or the index is damaged or missing.
    """
    manifest = folder / MANIFEST
    if manifest.is_file():
        try:
            return {
                name: (size, crc) for name, (size, crc) in json.loads(manifest.read_text()).items()
            }
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{MANIFEST} is damaged ({error})") from error
    try:
        index = read_metadata(folder / ".metadata").storage_data or {}
    except (OSError, ValueError) as error:
        raise ValueError(f"it has no {MANIFEST} and no readable .metadata ({error})") from error
    ends: dict[str, int] = {}
    for piece in index.values():
        ends[piece.relative_path] = max(
            ends.get(piece.relative_path, 0), piece.offset + piece.length
        )
    return {name: (size, None) for name, size in ends.items()}


def _foreign(folder: Path) -> list[str]:
    """Problems with the index and the common state, which are pickles that all ranks load."""
    if not is_dist_checkpoint(folder):
        return [".metadata or metadata.json is missing"]
    try:
        _ = DistTensors(folder).common
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


def _difference(path: Path, size: int, checksum: int | None) -> list[str]:
    if not path.is_file():
        return [f"{path.name} is missing"]
    actual = path.stat().st_size
    if actual < size or (actual > size and checksum is not None):
        return [f"{path.name} has {actual:,} of {size:,} bytes"]
    if checksum is not None and _checksum(path) != checksum:
        return [f"{path.name} differs from what was written (its checksum is wrong)"]
    return []


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _write_durably(path: Path, values: dict[str, list[int]]) -> None:
    with path.open("w") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
