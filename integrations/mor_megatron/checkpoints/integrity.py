"""Whether a checkpoint on disk is what was written: a manifest of sizes and checksums.

`seal` writes `manifest.json` last, so a folder that has one was whole; `damage` compares. The ranks
share the files: each reads its part once, at the speed of a CRC. A folder that another program wrote
has no manifest; then the index of Megatron's `torch_dist` format says which files it must have, and
how long they are at least. With or without a manifest, whoever wrote it could have put code into its
pickles: the index and the common state must hold plain values only.
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
    """Write the manifest of a folder whose files are all written. All ranks call it.

    Raises:
        OSError: a file cannot be read, or the manifest cannot be written; on every rank.
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
    """What is wrong with a checkpoint; None where it is whole. All ranks call it, and agree."""
    if not folder.is_dir():
        return _first_of("it is not there")
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
    """Raise the first error that a rank has, if any, on every rank. All ranks call it."""
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
    """Size of each file that must be there, and its checksum where it is known.

    Raises:
        ValueError: what says so is damaged or missing.
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
        raise ValueError(f"it has no {MANIFEST}, and no readable .metadata ({error})") from error
    ends: dict[str, int] = {}
    for piece in index.values():
        ends[piece.relative_path] = max(
            ends.get(piece.relative_path, 0), piece.offset + piece.length
        )
    return {name: (size, None) for name, size in ends.items()}


def _foreign(folder: Path) -> list[str]:
    """What is wrong with the parts that all ranks need, and that could hold more than values."""
    if not is_dist_checkpoint(folder):
        return ["it has no .metadata and metadata.json"]
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
        return [f"{path.name} has other contents than were written"]
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
