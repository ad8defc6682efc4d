"""From settings to the layer list that an unmodified GPTModel builds.

    config = TransformerConfig(num_layers=8, ...)
    block = recursion_block_spec(config, RecursionConfig(3, router=ExpertChoice()))
    model = GPTModel(config, transformer_layer_spec=block, ...)

`num_layers` counts the unrolled depth: 8 with 3 recursions under middle-cycle sharing are a prelude
layer, a block of 2 that runs 3 times, and a coda layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from mor_layers import RecursionConfig
from mor_megatron.attention import SDPACoreAttention
from mor_megatron.layer import RecursionLayer, RecursionSubmodules
from mor_megatron.norms import Norm


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed, which Megatron then builds its layers from."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE


def default_layer_spec(config: TransformerConfig, is_moe: bool | None = None) -> ModuleSpec:
    """The layer Megatron would build for `config`: Transformer Engine's where it is installed and
    CUDA is available, else the local one on SDPA and a norm that knows sequence parallelism.

    Args:
        is_moe: whether its MLP is a mixture of experts; by default if `config` has experts.

    Raises:
        ValueError: grouped expert matrix products without Transformer Engine, where Megatron would
            run the experts one by one and say nothing.
    """
    num_experts = None if is_moe is False else config.num_moe_experts
    if has_transformer_engine() and torch.cuda.is_available():
        parts = get_gpt_layer_with_transformer_engine_submodules(
            num_experts=num_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        return ModuleSpec(module=TransformerLayer, submodules=parts)
    if config.moe_grouped_gemm:
        raise ValueError(
            "moe_grouped_gemm=True needs Transformer Engine and CUDA; without them Megatron runs "
            "experts one by one. Set moe_grouped_gemm=False."
        )
    parts = get_gpt_layer_local_submodules(
        num_experts=num_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    attention = cast(ModuleSpec, parts.self_attention)
    changes: dict[str, Any] = {}
    attention_parts = cast(Any, attention.submodules)
    if attention_parts.core_attention is DotProductAttention:
        changes["core_attention"] = SDPACoreAttention
    if config.qk_layernorm:
        changes |= {"q_layernorm": Norm, "k_layernorm": Norm}
    parts = replace(
        parts,
        input_layernorm=Norm,
        pre_mlp_layernorm=Norm,
        self_attention=replace(attention, submodules=replace(attention_parts, **changes)),
    )
    return ModuleSpec(module=TransformerLayer, submodules=parts)


def recursion_layer_spec(
    layer_specs: Sequence[ModuleSpec], recursion: RecursionConfig, first_layer: int | None = None
) -> ModuleSpec:
    """One entry of `TransformerBlockSubmodules.layer_specs`: a recursion over the given layers.

    Args:
        layer_specs: the K layers of the shared block.
        recursion: steps, router, KV policy, norms; `sharing` is not read, a step runs all K.
        first_layer: layers of the unrolled model before it; numbers its layers in Megatron's logs.
    """
    if not layer_specs:
        raise ValueError("a recursion needs at least one layer. Pass the specs of its layers.")
    return ModuleSpec(
        module=RecursionLayer,
        submodules=cast(Any, RecursionSubmodules(tuple(layer_specs))),
        params={"recursion": recursion, "first_layer": first_layer},
    )


@dataclass(frozen=True)
class _Entry:
    """An entry of the layer list, and the unrolled layers it stands for."""

    spec: ModuleSpec
    num_layers: int


def recursion_block_spec(
    config: TransformerConfig,
    recursion: RecursionConfig,
    layer_spec: ModuleSpec | None = None,
    vp_stage: int | None = None,
    dense_layer_spec: ModuleSpec | None = None,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage: `transformer_layer_spec` of an unmodified GPTModel.

    Each recursion lives inside one stage. With `pipeline_model_parallel_layout` set (in unrolled
    layers), stages are as it says, else they are as even as the recursion allows.
    `config.pipeline_model_parallel_layout` is set to the list's entries: Megatron derives
    checkpoint keys from it, which so do not depend on the number of stages.

    Args:
        config: `num_layers` counts the unrolled depth.
        recursion: sharing, steps, router, KV policy, norms.
        layer_spec: the shared layers; default `default_layer_spec(config)`.
        vp_stage: must be None; virtual stages are not used here.
        dense_layer_spec: prelude and coda layers; default `layer_spec`.

    Raises:
        ValueError: layers that do not divide, or stages that would cut a recursion.
    """
    if vp_stage is not None:
        raise ValueError(
            f"vp_stage={vp_stage}: a recursion inside one stage has no virtual stages. Set "
            "virtual_pipeline_model_parallel_size=None."
        )
    layer_spec = layer_spec or default_layer_spec(config)
    entries = _entries(config, recursion, layer_spec, dense_layer_spec or layer_spec)
    size = config.pipeline_model_parallel_size
    rank = 0
    if size > 1:
        given = config.pipeline_model_parallel_layout
        stages = _stages_of(given, entries) if given else _even_stages(entries, size)
        rank = parallel_state.get_pipeline_model_parallel_rank()
        config.pipeline_model_parallel_layout = _layout(stages, size)
        entries = stages[rank]
    layer_norm = Norm
    if has_transformer_engine() and _is_transformer_engine(layer_spec):
        from megatron.core.extensions.transformer_engine import TENorm

        layer_norm = TENorm
    return TransformerBlockSubmodules(
        layer_specs=[entry.spec for entry in entries],
        layer_norm=cast(Any, layer_norm),
    )


def _entries(
    config: TransformerConfig,
    recursion: RecursionConfig,
    layer_spec: ModuleSpec,
    dense_layer_spec: ModuleSpec,
) -> list[_Entry]:
    schedule = recursion.schedule(config.num_layers)
    # A cyclic step runs the whole block; in a sequence each layer repeats on its own.
    sizes = [schedule.block_size] if schedule.is_cyclic else [1] * schedule.block_size
    entries = [_Entry(dense_layer_spec, 1)] * schedule.prelude
    done = schedule.prelude
    for size in sizes:
        spec = recursion_layer_spec([layer_spec] * size, recursion, first_layer=done)
        entries.append(_Entry(spec, size * recursion.num_recursions))
        done += size * recursion.num_recursions
    return entries + [_Entry(dense_layer_spec, 1)] * schedule.coda


def _even_stages(entries: list[_Entry], size: int) -> list[list[_Entry]]:
    """Consecutive entries, none empty, with the deepest stage as shallow as possible."""
    if size > len(entries):
        raise ValueError(
            f"pipeline_model_parallel_size={size} exceeds the {len(entries)} parts of the model "
            f"({', '.join(str(e.num_layers) for e in entries)} unrolled layers), and a recursion "
            f"inside one stage is not cut. Use {len(entries)} stages or fewer."
        )
    if size == 1:
        return [entries]
    candidates = [
        [entries[:cut], *_even_stages(entries[cut:], size - 1)]
        for cut in range(1, len(entries) - size + 2)
    ]
    return min(candidates, key=lambda stages: max(map(_depth, stages)))


def _depth(stage: list[_Entry]) -> int:
    return sum(entry.num_layers for entry in stage)


def _stages_of(layout: PipelineParallelLayerLayout, entries: list[_Entry]) -> list[list[_Entry]]:
    rest, stages = list(entries), []
    for row in layout.layout:
        wanted = sum(kind.name == "decoder" for kind in row[0])
        stage: list[_Entry] = []
        while rest and _depth(stage) < wanted:
            stage.append(rest.pop(0))
        if _depth(stage) != wanted:
            raise ValueError(
                f"pipeline_model_parallel_layout={layout!r} gives stage {len(stages)} {wanted} "
                f"unrolled layers, which cuts a recursion. The model's parts have "
                f"{', '.join(str(e.num_layers) for e in entries)} layers: put whole parts into "
                "stages, or leave the layout out."
            )
        stages.append(stage)
    return stages


def _layout(stages: list[list[_Entry]], size: int) -> PipelineParallelLayerLayout:
    rows = [["decoder"] * len(stage) for stage in stages]
    rows[0].insert(0, "embedding")
    rows[-1].append("loss")
    return PipelineParallelLayerLayout(rows, size)


def _is_transformer_engine(layer_spec: ModuleSpec) -> bool:
    core = cast(Any, layer_spec.submodules).self_attention.submodules.core_attention
    return getattr(core, "__module__", "").startswith("megatron.core.extensions.transformer_engine")
