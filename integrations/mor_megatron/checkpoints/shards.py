"""Whole tensors from the model that is spread over the ranks, and into it, whatever its layout."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from torch import Tensor, nn


def load_tensors(chunks: list[nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors by Megatron's names into the chunks of this rank.

    Rows that pad the vocabulary are set to zero.

    Raises:
        ValueError: the tensor of a parameter or buffer is missing, or has another shape.
    """
    with torch.no_grad():
        for chunk in chunks:
            for shard in _shards(chunk):
                if shard.key not in tensors:
                    raise ValueError(f"{shard.key!r} is in the model, but not in the weights.")
                whole = tensors[shard.key]
                if shard.allow_shape_mismatch and len(whole) < shard.global_shape[0]:
                    rows = shard.global_shape[0] - len(whole)  # of a padded vocabulary
                    whole = torch.cat([whole, whole.new_zeros(rows, *whole.shape[1:])])
                if tuple(whole.shape) != tuple(shard.global_shape):
                    raise ValueError(
                        f"{shard.key!r} has shape {tuple(whole.shape)}; the model needs "
                        f"{tuple(shard.global_shape)}."
                    )
                assert shard.data is not None
                shard.data.copy_(whole[shard.global_slice()])


def whole_tensors(chunks: list[nn.Module], on_all_ranks: bool = False) -> dict[str, Tensor] | None:
    """The inverse of `load_tensors`: whole tensors by Megatron's names, on the CPU.

    All ranks must call it. Only the first rank gets the tensors, and the others None, unless
    `on_all_ranks` is True. The whole model must fit into the CPU memory of these ranks. Convert a
    larger model through a checkpoint.
    """
    own = [
        (shard.key, shard.global_shape, shard.global_slice(), shard.data.cpu())
        for chunk in chunks
        for shard in _shards(chunk)
        if is_main_replica(shard.replica_id) and shard.data is not None
    ]
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    if on_all_ranks:
        torch.distributed.all_gather_object(ranks, own)
    elif torch.distributed.get_rank() == 0:
        torch.distributed.gather_object(own, ranks)
    else:
        torch.distributed.gather_object(own)
        return None
    tensors: dict[str, Tensor] = {}
    for key, shape, where, part in (entry for rank in ranks for entry in rank):
        tensors.setdefault(key, part.new_empty(shape))[where] = part
    return tensors


def _shards(chunk: Any) -> Iterator[ShardedTensor]:
    """The shards of a chunk. Their data is that of the model, so writing to it changes the model."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    entries = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    for entry in entries.values():
        if isinstance(entry, ShardedTensorFactory):  # a gated linear_fc1 has two halves
            yield from replace(entry, data=entry.data.detach()).build()  # type: ignore[misc]
        elif isinstance(entry, ShardedTensor):
            yield entry
