"""Which tensors of a model folder make up each parameter of a Megatron GPTModel with recursions.

The names come from `mor_megatron.checkpoints.weights`, which describes Megatron's checkpoints. A
parameter of a module has the same name as its tensor in a checkpoint, except for

* norms, which a checkpoint names as if they were fused into the linear layer that follows, as
  Transformer Engine does. Both names get a mapping, and the model has one of them;
* experts, which a checkpoint stores as one tensor, and a model as one parameter per expert.

Legend: `e` experts, `f` width of an expert, `h` hidden, `r` recursion steps.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    ColumnParallelMapping,
    FusedExpertMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
)
from torch import Tensor, nn

from mor_layers import DecoderConfig
from mor_layers.weights import weight_names
from mor_megatron.checkpoints.weights import block_depths, megatron_names

_PREFIX = "model."  # of every name in the folder
_LOCAL_NORMS = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}
"""Where a layer without Transformer Engine has the norms that a checkpoint names as fused."""
_ROW_PARALLEL = ("output", "down")
"""The projections whose inputs are split over the tensor-parallel ranks."""


def mappings(config: DecoderConfig) -> list[MegatronParamMapping[Any]]:
    """The mapping of each parameter and persistent buffer.

    Raises:
        ValueError: the experts have loss-free biases.
    """
    routers = [
        f"decoder.layers.{depth}.recursion.{name.removeprefix(f'recursions.{block}.')}"
        for block, depth in block_depths(config).items()
        for name in weight_names(config)
        if name.startswith(f"recursions.{block}.router.")
    ]
    found: dict[str, MegatronParamMapping[Any]] = {}
    for theirs, ours in megatron_names(config, routers).items():
        names = tuple(f"{_PREFIX}{name}" for name in ours)
        for mapping in _mappings_of(theirs, names, config):
            found[mapping.megatron_param] = mapping
    return list(found.values())


def _mappings_of(
    theirs: str, ours: tuple[str, ...], config: DecoderConfig
) -> Iterator[MegatronParamMapping[Any]]:
    """The mappings of one tensor of a checkpoint, under each name that it may have in a model."""
    if ".experts.experts." in theirs:
        assert config.moe is not None
        for expert in range(config.moe.num_experts):
            for name in _expert_parameters(theirs, expert):
                if len(ours) == 2:
                    yield StackedGatedExperts(name, *ours)
                else:
                    yield FusedExpertMapping(name, *ours)
        return
    yield _mapping(theirs, ours)
    for fused, local in _LOCAL_NORMS.items():
        if fused in theirs:
            yield WholeMapping(theirs.replace(fused, local), *ours)


def _expert_parameters(theirs: str, expert: int) -> tuple[str, str]:
    """An expert's weight in experts that run one by one, and in Transformer Engine's groups."""
    place, linear = theirs.removesuffix(".weight").split(".experts.experts.")
    return (
        f"{place}.experts.local_experts.{expert}.{linear}.weight",
        f"{place}.experts.{linear}.weight{expert}",
    )


def _mapping(theirs: str, ours: tuple[str, ...]) -> MegatronParamMapping[Any]:
    if theirs.endswith((".linear_qkv.weight", ".linear_qkv.bias")):
        return QKVMapping(theirs, *ours)
    if theirs.endswith(".linear_fc1.weight"):
        return GatedMLPMapping(theirs, *ours)
    if theirs.endswith(".linear_proj.weight") or theirs.endswith(".linear_fc2.weight"):
        return RowParallelMapping(theirs, *ours)
    if theirs in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return AutoMapping(theirs, *ours)
    if ".deltas." in theirs:
        return _delta_mapping(theirs, *ours)
    if len(ours) > 1:
        return StackMapping(theirs, dict(enumerate(ours)))
    return WholeMapping(theirs, *ours)


def _delta_mapping(theirs: str, ours: str) -> MegatronParamMapping[Any]:
    """Of `....deltas.<projection>.<step>.<part>`, which is split as its projection's weight is."""
    *_, projection, _, part = theirs.split(".")
    if projection in _ROW_PARALLEL:
        return RowParallelMapping(theirs, ours) if part == "a" else WholeMapping(theirs, ours)
    return WholeMapping(theirs, ours) if part == "a" else ColumnParallelMapping(theirs, ours)


class WholeMapping(ReplicatedMapping):
    """A tensor that all tensor-parallel ranks hold as a whole.

    Megatron-Bridge's own mapping sends it from the first rank to the others on the device of the
    module's first parameter. Modules that have only buffers, such as thresholds, have none; and every
    rank has read the tensor already.
    """

    def hf_to_megatron(self, hf_weights: Tensor, megatron_module: nn.Module) -> Tensor:
        return hf_weights


class StackMapping(MegatronParamMapping[dict[int, Tensor]]):
    """A replicated parameter that stacks tensors: `r` routers over experts, `[e h]` to `[r e h]`."""

    def __init__(self, megatron_param: str, hf_param: dict[int, str]) -> None:
        super().__init__(megatron_param, hf_param)

    def hf_to_megatron(self, hf_weights: dict[int, Tensor], megatron_module: nn.Module) -> Tensor:
        return torch.stack(list(hf_weights.values()))

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: nn.Module | None
    ) -> dict[str, Tensor]:
        whole = self.broadcast_from_pp_rank(megatron_weights, cache_key=str(self.hf_param))
        if whole is None:
            return {}
        return dict(zip(self.hf_param.values(), whole.unbind(), strict=True))


class StackedGatedExperts(GatedMLPMapping):
    """One expert's gate and up projections, of which a folder has one stack each, `[e f h]`."""

    is_grouped_export = True
    """Megatron-Bridge collects the exported tensors of all experts under one name and stacks them."""

    def hf_to_megatron(self, hf_weights: dict[str, Tensor], megatron_module: nn.Module) -> Tensor:
        expert = int(re.findall(r"(?:local_experts\.|\.weight)(\d+)", self.megatron_param)[0])
        own = {name: stack[expert] for name, stack in hf_weights.items()}
        return super().hf_to_megatron(own, megatron_module)
