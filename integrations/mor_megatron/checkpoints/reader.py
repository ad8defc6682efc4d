"""Reads checkpoints in Megatron's `torch_dist` format without running code that they may contain.

torch's reader unpickles `.metadata` and all entries other than tensors without restrictions, so an
untrusted checkpoint could run arbitrary code. Here both are read by the functions of `dist_files`,
which only create the classes that describe a checkpoint, plain values and tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from mor_megatron.checkpoints.dist_files import read_metadata, unpickled


class RestrictedReader(FileSystemReader):
    """torch's reader of a folder, with restricted unpickling."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Like the base class, but only creates the classes that describe a checkpoint."""
        rank = kwargs.get("rank")
        metadata = read_metadata(
            Path(self.path, ".metadata" if rank is None else f"__{rank}.metadata")
        )
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Like the base class, but only accepts entries of plain values and tensors."""
        load_bytes = planner.load_bytes

        def load_plain_values(item: Any, value: Any) -> None:
            # The planner then unpickles the same bytes without restrictions, which is safe because
            # this check has passed.
            unpickled(value.getvalue(), Path(self.path), f"entry {item.storage_index.fqn!r}")
            load_bytes(item, value)

        planner.load_bytes = load_plain_values
        return super().read_data(plan, planner)


@contextmanager
def restricted_reading() -> Iterator[None]:
    """A context in which Megatron reads checkpoints with a `RestrictedReader`."""

    def reader(folder: str | Path, *args: Any, **kwargs: Any) -> FileSystemReader:
        return RestrictedReader(folder)

    modules = (serialization, torch_strategies)  # one imports the function from the other
    before = [module._get_filesystem_reader for module in modules]
    for module in modules:
        module._get_filesystem_reader = reader
    try:
        yield
    finally:
        for module, original in zip(modules, before, strict=True):
            module._get_filesystem_reader = original
