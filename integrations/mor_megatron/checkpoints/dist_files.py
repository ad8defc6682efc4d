"""The files of a `torch_dist` checkpoint, read and written by one process without process groups.

`.metadata` says in which file, from which byte on, each piece of each tensor lies; a piece is what
`torch.save` makes of it. What no rank shards, such as a training step, is one entry `common_state`.
So a tensor of any layout is put together from its pieces, and a whole one is a single piece, which
any layout can load parts of. One tensor at a time is in memory.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as format

_METADATA, _CONFIG, _DATA = ".metadata", "metadata.json", "__0_0.distcp"
_COMMON = "common_state/shard_0_1"


def is_dist_checkpoint(folder: Path) -> bool:
    """Whether the folder itself is one."""
    return (folder / _METADATA).is_file() and (folder / _CONFIG).is_file()


class DistTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint's folder by global name, put together when they are asked for.

    Raises:
        ValueError: a file is missing, damaged or cut short; here, or when a tensor is read.
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder / _METADATA)
        self._entries = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, format.TensorStorageMetadata)
        }
        self._check_files()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        pieces = [(chunk, self._piece(name, chunk.offsets, chunk.sizes)) for chunk in entry.chunks]
        if len(pieces) == 1 and pieces[0][1].shape == entry.size:
            return pieces[0][1]
        covered = sum(piece.numel() for _, piece in pieces)
        if covered != entry.size.numel():
            raise ValueError(
                f"{self.folder}: tensor {name!r} has {entry.size.numel()} numbers, and its pieces "
                f"{covered}."
            )
        whole = torch.empty(entry.size, dtype=pieces[0][1].dtype)
        for chunk, piece in pieces:
            where = zip(chunk.offsets, chunk.sizes, strict=True)
            whole[tuple(slice(first, first + size) for first, size in where)] = piece
        return whole

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor, which is not read."""
        return self._entries[name].size

    @property
    def common(self) -> dict[str, Any]:
        """What no rank shards; plain values and tensors.

        Raises:
            ValueError: it is not there, or damaged.
        """
        legacy = self.folder / "common.pt"
        if legacy.is_file():  # Megatron takes it first, too
            return unpickled(legacy.read_bytes(), legacy, "common state")
        if _COMMON not in self._metadata.state_dict_metadata:
            raise ValueError(f"{self.folder} has no entry {_COMMON!r}.")
        info = self._metadata.storage_data[format.MetadataIndex(_COMMON)]
        (values,) = unpickled(self._bytes(_COMMON, info), self._path(info), _COMMON)
        return values

    def _piece(self, name: str, offsets: torch.Size, sizes: torch.Size) -> Tensor:
        info = self._metadata.storage_data[format.MetadataIndex(name, offsets)]
        tensor = unpickled(self._bytes(name, info), self._path(info), f"tensor {name!r}")
        if tensor.shape != sizes:
            raise ValueError(
                f"{self._path(info)}, tensor {name!r}: a piece has shape {tuple(tensor.shape)}, and "
                f"{_METADATA} says {tuple(sizes)}."
            )
        return tensor

    def _bytes(self, name: str, info: Any) -> bytes:
        with self._path(info).open("rb") as file:
            file.seek(info.offset)
            return file.read(info.length)

    def _path(self, info: Any) -> Path:
        return self.folder / info.relative_path

    def _check_files(self) -> None:
        sizes: dict[str, int] = {}
        for index, info in self._metadata.storage_data.items():
            path = self._path(info)
            if info.relative_path not in sizes:
                if not path.is_file():
                    raise ValueError(f"{path} is missing; tensor {index.fqn!r} is in it.")
                sizes[info.relative_path] = path.stat().st_size
            if info.offset + info.length > sizes[info.relative_path]:
                raise ValueError(f"{path} is cut short; tensor {index.fqn!r} is not whole in it.")


def write_dist_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    objects: list[str],
    common: dict[str, Any],
    written: Callable[[str], None] | None = None,
) -> None:
    """Write a checkpoint into an existing folder, tensor by tensor, each in one piece.

    Args:
        objects: names of entries that hold no more than None, as layers without extra state have.
        common: what no rank shards; plain values and tensors.
        written: called with the name of each tensor after it.
    """
    entries: dict[str, Any] = {}
    places: dict[format.MetadataIndex, Any] = {}
    with (folder / _DATA).open("wb") as file:

        def write(index: format.MetadataIndex, value: object) -> None:
            begin = file.tell()
            torch.save(value, file)
            places[index] = filesystem._StorageInfo(_DATA, begin, file.tell() - begin)

        for name, tensor in tensors.items():
            # A view would be saved with all that it is a view of.
            tensor = tensor.detach().cpu().contiguous()
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            start = torch.Size([0] * tensor.dim())
            write(format.MetadataIndex(name, start), tensor if whole else tensor.clone())
            entries[name] = format.TensorStorageMetadata(
                format.TensorProperties.create_from_tensor(tensor),
                tensor.shape,
                [format.ChunkStorageMetadata(start, tensor.shape)],
            )
            if written is not None:
                written(name)
        for name, value in {**dict.fromkeys(objects), _COMMON: common}.items():
            write(format.MetadataIndex(name), [value])
            entries[name] = format.BytesStorageMetadata()
    content = format.Metadata(
        entries,
        storage_data=places,
        storage_meta=format.StorageMeta(),
        version=filesystem.CURRENT_DCP_VERSION,
    )
    with (folder / _METADATA).open("wb") as file:
        pickle.dump(content, file)
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / _CONFIG).write_text(json.dumps(config), "utf-8")


def unpickled(data: bytes, path: Path, what: str) -> Any:
    """Plain values and tensors from what `torch.save` wrote; nothing else is ever made.

    Raises:
        ValueError: the bytes are damaged, or hold something else.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            broken = parts.testzip()  # torch.load does not look at the checksums of torch.save
        if broken is not None:
            raise ValueError(f"the checksum of {broken} is wrong")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}, {what}: damaged, or more than plain values: {first}") from error


def read_metadata(path: Path) -> format.Metadata:
    """The description of a checkpoint, which is a pickle: no other classes are made from it.

    Raises:
        ValueError: the file is damaged, or holds something else.
        FileNotFoundError: there is no such file.
    """
    try:
        with path.open("rb") as file:
            found = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise ValueError(f"{path} is damaged, or no checkpoint's: {error}") from error
    if not isinstance(found, format.Metadata):
        raise ValueError(f"{path} holds {type(found).__name__}, not a checkpoint's metadata.")
    return found


class _MetadataUnpickler(pickle.Unpickler):
    """Makes the classes that describe a checkpoint, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(vars(torch).get(name), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        for known in (format, planner, filesystem):
            found = vars(known).get(name)
            if module != known.__name__ or not isinstance(found, type):
                continue
            if found.__module__ == module:  # not what the module merely imports
                return found
        if module == "megatron.core.dist_checkpointing.strategies.torch":
            with suppress(AttributeError):
                found = super().find_class(module, name)
                if name in ("MCoreMetadata", "MCoreSavePlan"):
                    return found
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata")
