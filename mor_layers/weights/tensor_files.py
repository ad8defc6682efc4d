"""Tensors in files, read one at a time: safetensors and PyTorch's `.bin`, in one or several files.

Tensors are checked against the headers and index of their files. Errors name the file and the
tensor.
"""

import json
import pickle
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

SAFETENSORS = "model.safetensors"
_PICKLED = "pytorch_model.bin"
_LONGEST_NAME = 255
"""Longest file name in characters; no common file system allows more."""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class LazyTensors(Mapping[str, Tensor]):
    """A mapping that produces each tensor on demand and does not keep it.

    Args:
        names: all names, in order.
        make: returns the tensor with a given name.
    """

    def __init__(self, names: list[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_tensors(folder: Path) -> LazyTensors:
    """The tensors of a folder: of its model.safetensors or pytorch_model.bin, or of the files in
    its index.

    Raises:
        ValueError: there are none, or a file is damaged. Damage may only be found when a tensor is
            read.
    """
    for name in (SAFETENSORS, _PICKLED):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return open_tensor_file(folder / name)
        if index.is_file():
            return _indexed(index)
    raise ValueError(f"{folder} has neither {SAFETENSORS} nor {_PICKLED}, and no index of either.")


def open_tensor_file(path: Path) -> LazyTensors:
    """The tensors of one file.

    Raises:
        ValueError: the file is damaged, which may only be found when a tensor is read.
    """
    return LazyTensors(_names(path), lambda name: _read(path, name))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], written: Callable[[str], None] | None = None
) -> None:
    """Write a safetensors file, holding one tensor in memory at a time.

    Args:
        written: called with the name of each tensor after it has been written.

    Raises:
        ValueError: the format has no name for a tensor's dtype.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # The header comes first in the file but is only known at the end, so space is reserved for it.
    # The format allows the rest to be filled with spaces.
    room = 64 + sum(len(json.dumps(name)) + 256 for name in tensors)
    room += -room % 8
    with path.open("wb") as file:
        file.write(room.to_bytes(8, "little") + b" " * room)
        end = 0
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                raise ValueError(
                    f"{name!r} has dtype {tensor.dtype}, which {path.name} cannot hold."
                )
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            begin, end = end, end + data.nbytes
            header[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            file.write(data)
            if written is not None:
                written(name)
        text = json.dumps(header).encode()
        assert len(text) <= room
        file.seek(8)
        file.write(text)


def _indexed(index: Path) -> LazyTensors:
    try:
        files: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not a valid index of tensors: {error}.") from error
    # A name with folders in it could lead to files that do not belong to the model.
    if not isinstance(files, dict) or not all(
        isinstance(name, str) and Path(name).name == name and len(name) <= _LONGEST_NAME
        for name in files.values()
    ):
        raise ValueError(
            f"{index} is not a valid index of tensors: expected a mapping from tensors to names of "
            f"files beside it under 'weight_map', got {reprlib.repr(files)}."
        )
    for name in sorted(set(files.values())):
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} lists {name}, which does not exist.")
    return LazyTensors(list(files), lambda tensor: _read(index.parent / files[tensor], tensor))


def _names(path: Path) -> list[str]:
    if path.suffix == ".bin":
        return list(_unpickled(path))
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}.") from error


def _read(path: Path, name: str) -> Tensor:
    if path.suffix == ".bin":
        tensors = _unpickled(path)
        if name not in tensors:
            raise ValueError(f"{path} has no tensor {name!r}, although its index lists it there.")
        return tensors[name]
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}, tensor {name!r}: {error}.") from error


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:  # memory-mapped, so that only the tensors in use are read
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged, or contains more than tensors: {first}") from error
    is_mapping = isinstance(found, dict) and all(isinstance(name, str) for name in found)
    if not is_mapping or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} is not a mapping from names to tensors.")
    return found
