"""Reading a checkpoint through Megatron's `torch_dist` format without running what it may hold.

torch's reader unpickles `.metadata` and the entries that are no tensors without any restriction, so
a checkpoint from elsewhere could run code of its own. Here both go through the readers of
`dist_files`, which make the classes that describe a checkpoint, plain values and tensors.
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
    """torch's reader of a folder, but for what it would unpickle without restriction."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As torch's, for the classes that describe a checkpoint."""
        rank = kwargs.get("rank")
        metadata = read_metadata(
            Path(self.path, ".metadata" if rank is None else f"__{rank}.metadata")
        )
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As torch's, for entries of plain values and tensors."""
        load_bytes = planner.load_bytes

        def load_plain_values(item: Any, value: Any) -> None:
            # Read once more by the planner, without restriction, but from the same bytes.
            unpickled(value.getvalue(), Path(self.path), f"entry {item.storage_index.fqn!r}")
            load_bytes(item, value)

        planner.load_bytes = load_plain_values
        return super().read_data(plan, planner)


@contextmanager
def restricted_reading() -> Iterator[None]:
    """Lets Megatron read checkpoints with a `RestrictedReader` for the length of the context."""

    def reader(folder: str | Path, *args: Any, **kwargs: Any) -> FileSystemReader:
        return RestrictedReader(folder)

    modules = (serialization, torch_strategies)  # the one imports the function from the other
    before = [module._get_filesystem_reader for module in modules]
    for module in modules:
        module._get_filesystem_reader = reader
    try:
        yield
    finally:
        for module, original in zip(modules, before, strict=True):
            module._get_filesystem_reader = original
