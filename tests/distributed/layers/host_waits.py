"""Finds where the host waits for the device: on a GPU each such place stops the queue of kernels.

A CPU does not wait, so what would is looked for: values that Python reads out of tensors, and
operations whose result has a size that depends on values.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mor_layers
import mor_megatron

_READS = ("tolist", "item", "numpy", "cpu", "__int__", "__float__", "__bool__", "__index__")
_SIZED_BY_VALUES = ("nonzero", "masked_select", "unique", "equal", "bincount", "is_nonzero")
_INDEXED = ("index.Tensor", "index_put", "_unsafe_index")
# Not by name: a clone is called like a package.
_OURS = [Path(package.__path__[0]) for package in (mor_layers, mor_megatron)]


def is_ours(path: Path) -> bool:
    """Whether a source file is one of our packages'."""
    return any(path.is_relative_to(folder) for folder in _OURS)


class HostWaits(TorchDispatchMode):
    """Counts them by `file:function` of our code that caused them, while it is entered.

    Tensors made from Python numbers count too: they are copied from memory that is not pinned, which
    a CUDA graph does not take.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function).removeprefix("aten.")
        if name.startswith(_SIZED_BY_VALUES) or (
            name.startswith(_INDEXED)
            and any(x is not None and x.dtype == torch.bool for x in args[1])
        ):
            self.note()
        if (
            name.startswith("repeat_interleave.Tensor")
            and (kwargs or {}).get("output_size") is None
        ):
            self.note()
        return function(*args, **(kwargs or {}))

    def note(self) -> None:
        """Count the innermost function of ours that is running, if any."""
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if is_ours(path):
                self.found[f"{path.name}:{frame.name}"] += 1
                return
            if "megatron" in path.parts:
                return  # Megatron's own, called by us


@contextmanager
def host_waits() -> Iterator[Counter[str]]:
    """Where our code waits within it."""
    mode = HostWaits()

    def watched(target: Any, name: str) -> Any:
        original = getattr(target, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            mode.note()
            return original(*args, **kwargs)

        return patch.object(target, name, call)

    patches = [watched(Tensor, name) for name in _READS] + [watched(torch, "tensor")]
    for entry in patches:
        entry.start()
    try:
        with mode:
            yield mode.found
    finally:
        for entry in patches:
            entry.stop()
