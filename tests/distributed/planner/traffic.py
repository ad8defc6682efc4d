"""Counts what a rank really sends, and what autograd really keeps.

Collectives are seen where PyTorch dispatches them, whoever calls them and in whichever pass.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode


class SentBytes(TorchDispatchMode):
    """Bytes that this rank sends, by process group and collective, as ring algorithms move them.

    Of `n` ranks each sends `(n - 1) / n` of what a gather collects, a reduce-scatter or an
    all-to-all starts from, and twice that share of what is all-reduced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[tuple[str, str], float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        group = next(g for a in args if (g := _group(a)) is not None)
        size = group.size()
        share = (size - 1) / size
        kind, tensors, factor = {
            "allreduce_": ("all_reduce", args[0], 2 * share),
            "allreduce_coalesced_": ("all_reduce", args[0], 2 * share),
            "_allgather_base_": ("all_gather", args[0], share),
            "allgather_": ("all_gather", args[0], share),
            "allgather_into_tensor_coalesced_": ("all_gather", args[0], share),
            "_reduce_scatter_base_": ("reduce_scatter", args[1], share),
            "reduce_scatter_tensor_coalesced_": ("reduce_scatter", args[1], share),
            "reduce_scatter_": ("reduce_scatter", args[1], share),
            "alltoall_base_": ("all_to_all", args[1], share),
            "send": ("send", args[0], 1.0),
            "recv_": ("receive", (), 1.0),
            "broadcast_": ("broadcast", args[0], 1.0),
            "barrier": ("barrier", (), 0.0),
        }[name]
        if size > 1:
            self.sent[group.group_desc, kind] += factor * sum(_bytes(t) for t in _flat(tensors))


@contextmanager
def kept_bytes(parameters: list[Tensor]) -> Iterator[dict[str, Any]]:
    """Bytes of the tensors autograd keeps, each storage once; those of `parameters` left out."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, Any] = {}
    report: dict[str, Any] = {"bytes": 0, "shapes": []}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in own and place not in storages:
            storages[place] = storage  # held, so that no address is used again
            report["bytes"] += storage.nbytes()
            report["shapes"].append((tuple(tensor.shape), str(tensor.dtype), storage.nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield report


def _group(value: Any) -> ProcessGroup | None:
    try:
        return ProcessGroup.unbox(value)
    except (RuntimeError, TypeError):
        return None


def _flat(tensors: Any) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    return [t for part in tensors for t in _flat(part)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
