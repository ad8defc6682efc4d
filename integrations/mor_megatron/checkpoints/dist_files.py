"""Reads and writes the files of a `torch_dist` checkpoint in one process, without process groups.

`.metadata` lists the file and the byte offset of each piece of each tensor. A piece is the output of
`torch.save`. State that is not sharded, such as the training step, is in one entry `common_state`.
Tensors saved in any layout are assembled from their pieces. Tensors are written as a single piece,
from which any layout can load its parts. Only one tensor at a time is in memory.
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
from torch.distributed.checkpoint import metadata as dcp

_METADATA, _CONFIG, _DATA = ".metadata", "metadata.json", "__0_0.distcp"
_COMMON = "common_state/shard_0_1"


def is_dist_checkpoint(folder: Path) -> bool:
    """Whether the folder itself is a `torch_dist` checkpoint."""
    return (folder / _METADATA).is_file() and (folder / _CONFIG).is_file()


class DistTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint's folder by global name, assembled when they are accessed.

    Raises:
        ValueError: a file is missing, damaged or truncated. Raised here or when a tensor is read.
        FileNotFoundError: the folder does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder / _METADATA)
        self._entries = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, dcp.TensorStorageMetadata)
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
                f"{self.folder}: tensor {name!r} has {entry.size.numel()} numbers, but its pieces "
                f"have {covered}. Restore the checkpoint from a copy."
            )
        whole = torch.empty(entry.size, dtype=pieces[0][1].dtype)
        for chunk, piece in pieces:
            where = zip(chunk.offsets, chunk.sizes, strict=True)
            whole[tuple(slice(first, first + size) for first, size in where)] = piece
        return whole

    def shape(self, name: str) -> torch.Size:
        """The shape of a whole tensor, without reading it."""
        return self._entries[name].size

    @property
    def common(self) -> dict[str, Any]:
        """The state that is not sharded, which consists of plain values and tensors.

        Raises:
            ValueError: it is missing or damaged.
        """
        legacy = self.folder / "common.pt"
        if legacy.is_file():  # Megatron also prefers this file
            return unpickled(legacy.read_bytes(), legacy, "common state")
        if _COMMON not in self._metadata.state_dict_metadata:
            raise ValueError(f"{self.folder} has no entry {_COMMON!r}.")
        info = self._metadata.storage_data[dcp.MetadataIndex(_COMMON)]
        (values,) = unpickled(self._bytes(_COMMON, info), self._path(info), _COMMON)
        return values

    def _piece(self, name: str, offsets: torch.Size, sizes: torch.Size) -> Tensor:
        info = self._metadata.storage_data[dcp.MetadataIndex(name, offsets)]
        tensor = unpickled(self._bytes(name, info), self._path(info), f"tensor {name!r}")
        if tensor.shape != sizes:
            raise ValueError(
                f"{self._path(info)}, tensor {name!r}: a piece has shape {tuple(tensor.shape)}, but "
                f"{_METADATA} says {tuple(sizes)}. Restore the checkpoint from a copy."
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
                    raise ValueError(f"{path} is missing. It contains tensor {index.fqn!r}.")
                sizes[info.relative_path] = path.stat().st_size
            if info.offset + info.length > sizes[info.relative_path]:
                raise ValueError(f"{path} is truncated, so tensor {index.fqn!r} is incomplete.")


def write_dist_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    objects: list[str],
    common: dict[str, Any],
    written: Callable[[str], None] | None = None,
) -> None:
    """Write a checkpoint into an existing folder, tensor by tensor, each as a single piece.

    Args:
        objects: names of entries that hold None, as layers without extra state have them.
        common: the state that is not sharded. Plain values and tensors.
        written: called with the name of each tensor after it is written.
    """
    entries: dict[str, Any] = {}
    places: dict[dcp.MetadataIndex, Any] = {}
    with (folder / _DATA).open("wb") as file:

        def write(index: dcp.MetadataIndex, value: object) -> None:
            begin = file.tell()
            torch.save(value, file)
            places[index] = filesystem._StorageInfo(_DATA, begin, file.tell() - begin)

        for name, tensor in tensors.items():
            # torch.save would save the whole storage of a view, so views are cloned.
            tensor = tensor.detach().cpu().contiguous()
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            start = torch.Size([0] * tensor.dim())
            write(dcp.MetadataIndex(name, start), tensor if whole else tensor.clone())
            entries[name] = dcp.TensorStorageMetadata(
                dcp.TensorProperties.create_from_tensor(tensor),
                tensor.shape,
                [dcp.ChunkStorageMetadata(start, tensor.shape)],
            )
            if written is not None:
                written(name)
        for name, value in {**dict.fromkeys(objects), _COMMON: common}.items():
            write(dcp.MetadataIndex(name), [value])
            entries[name] = dcp.BytesStorageMetadata()
    content = dcp.Metadata(
        entries,
        storage_data=places,
        storage_meta=dcp.StorageMeta(),
        version=filesystem.CURRENT_DCP_VERSION,
    )
    with (folder / _METADATA).open("wb") as file:
        pickle.dump(content, file)
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / _CONFIG).write_text(json.dumps(config), "utf-8")


def unpickled(data: bytes, path: Path, what: str) -> Any:
    """Load plain values and tensors that `torch.save` wrote. No other objects are created.

    Raises:
        ValueError: the bytes are damaged, or contain other objects.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            broken = parts.testzip()  # torch.load does not verify the checksums of torch.save
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
        raise ValueError(
            f"{path}, {what}: damaged, or not only plain values and tensors: {first}"
        ) from error


def read_metadata(path: Path) -> dcp.Metadata:
    """Read the metadata of a checkpoint. It is a pickle, so only the classes it needs are allowed.

    Raises:
        ValueError: the file is damaged, or contains other objects.
        FileNotFoundError: the file does not exist.
    """
    try:
        with path.open("rb") as file:
            found = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise
    except Exception as error:  # unpickling a damaged file can raise any exception
        raise ValueError(f"{path} is damaged, or not a checkpoint's metadata: {error}") from error
    if not isinstance(found, dcp.Metadata):
        raise ValueError(f"{path} holds {type(found).__name__}, not a checkpoint's metadata.")
    return found


class _MetadataUnpickler(pickle.Unpickler):
    """Only creates instances of the classes that describe a checkpoint.

    A pickle of another origin could otherwise run arbitrary code.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(vars(torch).get(name), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        for known in (dcp, planner, filesystem):
            found = vars(known).get(name)
            if module != known.__name__ or not isinstance(found, type):
                continue
            if found.__module__ == module:  # defined there, not only imported
                return found
        if module == "megatron.core.dist_checkpointing.strategies.torch":
            with suppress(AttributeError):
                found = super().find_class(module, name)
                if name in ("MCoreMetadata", "MCoreSavePlan"):
                    return found
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata")
