"""Weights between a `MoRTransformer` and a GPTModel with recursions, at any parallel layout.

Megatron names a whole tensor the same in every layout (the keys of `sharded_state_dict`), so a
translation of whole tensors and a cut along each rank's shards is all it takes. The translation is
linear: it serves gradients as well.

Legend: `g` key-value heads, `q` query heads per key-value head, `d` head size, `h` hidden.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from mor_layers import DecoderConfig, RecursionConfig
from torch import Tensor, nn


def megatron_tensors(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Whole tensors by Megatron's names from those of a `MoRTransformer`'s state dict.

    Raises:
        ValueError: a tensor is missing.
    """
    recursion = config.recursion or RecursionConfig(1, sharing="cycle")
    schedule = recursion.schedule(config.num_unrolled_layers)
    sizes = [schedule.block_size] if schedule.is_cyclic else [1] * schedule.block_size
    num_norms = 1 if recursion.share_norms else recursion.num_recursions
    result = {
        "embedding.word_embeddings.weight": _get(weights, "embedding.weight"),
        "decoder.final_layernorm.weight": _get(weights, "norm.weights.0"),
    }
    if not config.tie_embeddings:
        result["output_layer.weight"] = _get(weights, "output.weight")
    entry = 0
    for layer in range(schedule.prelude):
        result |= _layer(weights, f"prelude.layers.{layer}", f"decoder.layers.{entry}", config)
        entry += 1
    for block, size in enumerate(sizes):
        theirs = f"decoder.layers.{entry}.recursion"
        for layer in range(size):
            ours = f"recursions.{block}.layers.layers.{layer}"
            result |= _layer(weights, ours, f"{theirs}.layers.{layer}", config, num_norms)
        router = f"recursions.{block}.router."
        for name in (name for name in weights if name.startswith(router)):
            result[f"{theirs}.router.{name.removeprefix(router)}"] = weights[name]
        entry += 1
    for layer in range(schedule.coda):
        result |= _layer(weights, f"coda.layers.{layer}", f"decoder.layers.{entry}", config)
        entry += 1
    return result


def load_tensors(chunks: list[nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Put whole tensors by Megatron's names into this rank's chunks.

    Raises:
        ValueError: a parameter or buffer of the model is not among them, or has another shape.
    """
    with torch.no_grad():
        for chunk in chunks:
            for shard in _shards(chunk):
                if shard.key not in tensors:
                    raise ValueError(f"{shard.key!r} is in the model, but not among the weights.")
                whole = tensors[shard.key]
                if tuple(whole.shape) != tuple(shard.global_shape):
                    raise ValueError(
                        f"{shard.key!r} has shape {tuple(whole.shape)}; the model needs "
                        f"{tuple(shard.global_shape)}."
                    )
                assert shard.data is not None
                shard.data.copy_(whole[shard.global_slice()])


def _shards(chunk: Any) -> Iterator[ShardedTensor]:
    """The shards of a chunk; writing to their data writes to the model."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    entries = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    for entry in entries.values():
        if isinstance(entry, ShardedTensorFactory):  # a gated linear_fc1: two halves of a parameter
            yield from replace(entry, data=entry.data.detach()).build()
        elif isinstance(entry, ShardedTensor):
            yield entry


def _layer(
    weights: Mapping[str, Tensor], ours: str, theirs: str, config: DecoderConfig, num_norms: int = 1
) -> dict[str, Tensor]:
    def get(name: str) -> Tensor:
        return _get(weights, f"{ours}.{name}.weight")

    heads = (config.kv_heads, -1, config.head_size)
    fused = [get(f"attention.{part}").unflatten(0, heads) for part in ("query", "key", "value")]
    layer = {
        # [g q d h], [g 1 d h], [g 1 d h] -> [g (q+2) d, h]
        "self_attention.linear_qkv.weight": torch.cat(fused, dim=1).flatten(0, 2),
        "self_attention.linear_proj.weight": get("attention.output"),
        "mlp.linear_fc1.weight": torch.cat([get("mlp.gate"), get("mlp.up")]),
        "mlp.linear_fc2.weight": get("mlp.down"),
    }
    for name, place in (("attention", "self_attention.linear_qkv"), ("mlp", "mlp.linear_fc1")):
        for step in range(num_norms):
            own = f"{step}." if num_norms > 1 else ""
            layer[f"{place}.layer_norm_{own}weight"] = _get(
                weights, f"{ours}.{name}_norm.weights.{step}"
            )
    return {f"{theirs}.{name}": tensor for name, tensor in layer.items()}


def _get(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise ValueError(f"the weights have no {name!r}. Are these the settings they belong to?")
    return weights[name]
