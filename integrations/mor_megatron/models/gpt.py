"""Makes the list of layers that an unmodified GPTModel builds from settings.

    config = TransformerConfig(num_layers=8, ...)
    block = recursion_block_spec(config, RecursionConfig(3, router=ExpertChoice()))
    model = GPTModel(config, transformer_layer_spec=block, ...)

`num_layers` is the unrolled depth: with 3 recursions and middle-cycle sharing, 8 layers are a
prelude layer, a block of 2 layers that runs 3 times, and a coda layer.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any, cast

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)

from mor_layers import RecursionConfig
from mor_layers.models import unrolled_lengths
from mor_megatron.layers import (
    AbsorbedLayer,
    LatentAttention,
    RecursionLayer,
    RecursionSubmodules,
    SDPACoreAttention,
    aware_of_padding,
    document_attention,
    local_norm,
)
from mor_megatron.parallel import blocks_per_part, even_stages
from mor_megatron.platform import has_transformer_engine


def default_layer_spec(config: TransformerConfig, is_moe: bool | None = None) -> ModuleSpec:
    """The spec of the layer that Megatron would build for `config`.

    This is Transformer Engine's layer if that is installed and CUDA is available. Otherwise it is
    the local layer, with SDPA and a norm that supports sequence parallelism.

    Args:
        is_moe: whether the MLP is a mixture of experts; by default, if `config` has experts.

    Raises:
        ValueError: grouped expert matrix products are requested without Transformer Engine, where
            Megatron would silently run the experts one by one; an attention for which Megatron has
            specs of its own; or, with Transformer Engine, latent attention with a norm of queries
            that have no latent row.
    """
    _refuse_other_specs(config)
    num_experts = None if is_moe is False else config.num_moe_experts
    uses_engine = config.transformer_impl == "transformer_engine" and torch.cuda.is_available()
    # The norms of multi-latent attention.
    norms_queries = not config.multi_latent_attention or config.q_lora_rank is not None  # type: ignore[attr-defined]
    if uses_engine and has_transformer_engine():
        if config.qk_layernorm and not norms_queries:
            raise ValueError(
                "multi_latent_attention=True with qk_layernorm=True and Transformer Engine needs "
                "q_lora_rank: without a latent row of queries, Megatron normalises the input of their "
                "projection a second time. Set q_lora_rank, or transformer_impl='local'."
            )
        parts = get_gpt_layer_with_transformer_engine_submodules(
            num_experts=num_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            qk_l2_norm=config.qk_l2_norm,
            use_te_activation_func=config.use_te_activation_func,
        )
        attention = cast(Any, parts.self_attention)
        core = replace(attention.submodules, core_attention=document_attention())
        parts = replace(
            parts,
            self_attention=replace(_latent(attention), submodules=core),
            mlp=aware_of_padding(parts.mlp),
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
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    attention, norm = cast(ModuleSpec, parts.self_attention), local_norm()
    changes: dict[str, Any] = {}
    attention_parts = cast(Any, attention.submodules)
    if attention_parts.core_attention is DotProductAttention:
        changes["core_attention"] = SDPACoreAttention
    if config.qk_layernorm and not config.qk_l2_norm:  # the latter takes precedence, as in Megatron
        keys_norm = "kv_layernorm" if config.multi_latent_attention else "k_layernorm"
        changes |= {"q_layernorm": norm if norms_queries else IdentityOp, keys_norm: norm}
    keys = dict(parts.sharded_state_dict_keys_map)
    if config.multi_latent_attention:
        keys |= _ENGINE_KEYS  # Megatron has none for its local layers
    if num_experts:  # like Transformer Engine's layers, which fuse this norm into dense MLPs only
        keys.pop("pre_mlp_layernorm.", None)
    parts = replace(
        parts,
        input_layernorm=norm,
        pre_mlp_layernorm=norm,
        mlp=aware_of_padding(parts.mlp),
        sharded_state_dict_keys_map=keys,
        self_attention=replace(_latent(attention), submodules=replace(attention_parts, **changes)),
    )
    return ModuleSpec(module=TransformerLayer, submodules=parts)


_ENGINE_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""The norms of latent attention and MLP in checkpoints, as Transformer Engine's layers fuse them."""


def _latent(attention: ModuleSpec) -> ModuleSpec:
    """The spec, with `LatentAttention` in the place of Megatron's."""
    is_latent = attention.module is MLASelfAttention
    return replace(attention, module=LatentAttention) if is_latent else attention


def _refuse_other_specs(config: TransformerConfig) -> None:
    """Raise ValueError if Megatron has a layer for `config` that is not built here."""
    rules = {
        "experimental_attention_variant": config.experimental_attention_variant,
        "use_kitchen": config.use_kitchen,
        "use_transformer_engine_op_fuser": config.use_transformer_engine_op_fuser,
        "use_grouped_gemm_for_dense_mlp": config.use_grouped_gemm_for_dense_mlp,
        "heterogeneous_block_specs": config.heterogeneous_block_specs,
        "transformer_impl": config.transformer_impl == "inference_optimized",
    }
    for option, is_given in rules.items():
        if is_given:
            raise ValueError(
                f"{option}={getattr(config, option)!r} needs layers that default_layer_spec does "
                "not build: you would silently get plain ones. Leave it out, or pass your own "
                "layer_spec."
            )


def recursion_layer_spec(
    layer_specs: Sequence[ModuleSpec], recursion: RecursionConfig
) -> ModuleSpec:
    """One entry of `TransformerBlockSubmodules.layer_specs`: a recursion over the given layers.

    Args:
        layer_specs: the K layers of the shared block.
        recursion: steps, router, KV policy and norms. `sharing` is ignored, because a step runs all
            K layers.

    Raises:
        ValueError: `layer_specs` is empty, or `recursion` has settings for the layers around it.
    """
    if not layer_specs:
        raise ValueError("a recursion needs at least one layer. Pass the specs of its layers.")
    lengths = {n: getattr(recursion, n) for n in ("prelude_layers", "coda_layers", "block_layers")}
    given = ", ".join(f"{name}={value}" for name, value in lengths.items() if value is not None)
    if given:
        raise ValueError(
            f"{given} would have no effect if you list the layers of the recursion, and those before "
            "and after it, yourself. Leave them out, or use recursion_block_spec."
        )
    return ModuleSpec(
        module=RecursionLayer,
        submodules=cast(Any, RecursionSubmodules(tuple(layer_specs))),
        params={"recursion": recursion},
    )


def recursion_block_spec(
    config: TransformerConfig,
    recursion: RecursionConfig | Sequence[RecursionConfig],
    layer_spec: ModuleSpec | None = None,
    vp_stage: int | None = None,
    dense_layer_spec: ModuleSpec | None = None,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, as `transformer_layer_spec` of an unmodified GPTModel.

    There is one entry for each unrolled layer, so that stages, checkpoint keys and logs are
    numbered as Megatron expects. Each recursion lies within one stage, so
    `config.pipeline_model_parallel_layout` must not split it. If the config does not say how to
    divide the layers, the layout is set here, as evenly as the recursion allows. So is
    `config.variable_seq_lengths` for a `loop_loss`, with which stages after the recursion receive the
    states of all loops.

    Args:
        config: `num_layers` is the unrolled depth.
        recursion: sharing, steps, router, KV policy, norms; or those of several recursions, one after
            another.
        layer_spec: spec of the shared layers. Default: `default_layer_spec(config)`, with experts
            in the layers that `config.moe_layer_freq` selects.
        vp_stage: must be None; virtual stages are not used here.
        dense_layer_spec: spec of prelude and coda layers. Default: `layer_spec`.

    Raises:
        ValueError: the layers cannot be divided into recursions, a stage would split a recursion,
            or `moe_layer_freq` asks for experts in some steps of a shared layer and not in others.
    """
    if vp_stage is not None:
        raise ValueError(
            f"vp_stage={vp_stage}: a recursion inside one stage has no virtual stages. Set "
            "virtual_pipeline_model_parallel_size=None."
        )
    layer_specs = [layer_spec] * config.num_layers if layer_spec else unrolled_layer_specs(config)
    parts = recursion_parts(config, recursion, layer_specs, dense_layer_spec)
    set_pipeline_layout(config, [len(part) for part in parts])
    file_keys_alike(config)
    last = recursion if isinstance(recursion, RecursionConfig) else recursion[-1]
    if last.loop_loss is not None and config.pipeline_model_parallel_size > 1:
        config.variable_seq_lengths = True
    first = get_transformer_layer_offset(config)
    check_whole(config, [len(part) for part in parts], first, get_num_layers_to_build(config))
    entries = [spec for part in parts for spec in part]
    return TransformerBlockSubmodules(
        layer_specs=entries[first : first + get_num_layers_to_build(config)],
        layer_norm=cast(Any, final_norm(layer_specs[-1])),
    )


def unrolled_layer_specs(config: TransformerConfig) -> list[ModuleSpec]:
    """`default_layer_spec` of each unrolled layer, with experts in those that
    `config.moe_layer_freq` selects.

    Raises:
        ValueError: `moe_layer_freq` is a list, but does not have one entry for each unrolled layer.
    """
    count, frequency = config.num_layers, config.moe_layer_freq
    if config.num_moe_experts is None:
        return [default_layer_spec(config)] * count
    if isinstance(frequency, int):
        has_experts = [index % frequency == 0 for index in range(count)]
    elif len(frequency) == count:
        has_experts = [bool(entry) for entry in frequency]
    else:
        raise ValueError(
            f"moe_layer_freq has {len(frequency)} entries, but num_layers={count}. Give one entry "
            "for each unrolled layer."
        )
    kinds = {kind: default_layer_spec(config, is_moe=kind) for kind in set(has_experts)}
    return [kinds[kind] for kind in has_experts]


def recursion_parts(
    config: TransformerConfig,
    recursion: RecursionConfig | Sequence[RecursionConfig],
    layer_specs: Sequence[ModuleSpec],
    dense_layer_spec: ModuleSpec | None = None,
) -> list[list[ModuleSpec]]:
    """Specs of all unrolled layers, grouped into parts that no pipeline stage may split.

    Args:
        layer_specs: one for each unrolled layer.
        dense_layer_spec: replaces the specs of layers outside of recursions.

    Raises:
        ValueError: the layers do not add up, or a shared layer has different specs at different steps.
    """
    recursions = [recursion] if isinstance(recursion, RecursionConfig) else list(recursion)
    if sum(own.depth_balance is not None for own in recursions) > 1:
        raise ValueError(
            "depth_balance is set for several recursions, but Megatron's layers would go on counting "
            "from one to the next. Set it for one of them."
        )
    if len(recursions) == 1:
        return _parts(config, recursions[0], layer_specs, dense_layer_spec)
    parts, first = [], 0
    for own, length in zip(
        recursions, unrolled_lengths(recursions, config.num_layers), strict=True
    ):
        specs = layer_specs[first : first + length]
        parts += _parts(config, own, specs, dense_layer_spec, first)
        first += length
    return parts


def _parts(
    config: TransformerConfig,
    recursion: RecursionConfig,
    layer_specs: Sequence[ModuleSpec],
    dense_layer_spec: ModuleSpec | None,
    begin: int = 0,
) -> list[list[ModuleSpec]]:
    """The parts of one recursion with the layers around it, which begin at layer `begin`."""
    num_layers = len(layer_specs)
    schedule = recursion.schedule(num_layers)
    prelude, steps = schedule.prelude, recursion.num_recursions
    end = num_layers - schedule.coda
    # A cyclic step runs the whole block; in a sequence each layer repeats on its own.
    size = schedule.block_size if schedule.is_cyclic else 1
    absorbed = ModuleSpec(module=AbsorbedLayer)
    blocks = []
    for first in range(prelude, end, size * steps):
        unrolled = layer_specs[first : first + size * steps]
        shared = unrolled[:size]
        for index, spec in enumerate(unrolled):
            if spec is not shared[index % size]:
                here = begin + first
                raise ValueError(
                    f"moe_layer_freq={config.moe_layer_freq} makes unrolled layers "
                    f"{here + index % size} and {here + index} (0-based) different, but they are "
                    "the same shared layer, which cannot be dense in one step and have experts in "
                    f"another. Use the same value for all {steps} steps."
                )
        # What surrounds the block is listed here.
        router = recursion.router_of(len(blocks))
        own = replace(
            recursion,
            prelude_layers=None,
            coda_layers=None,
            block_layers=None,
            router=router,
            anchor_every=None,
            depth_balance=recursion.depth_balance if router is recursion.router else None,
        )
        layer = recursion_layer_spec(shared, own)
        layer.params["keeps_together"] = True
        blocks.append([layer] + [absorbed] * (len(unrolled) - 1))
    together = blocks_per_part(recursion, len(blocks))
    starts = range(0, len(blocks), together)
    blocks = [list(chain(*blocks[start : start + together])) for start in starts]
    ends = [dense_layer_spec or spec for spec in layer_specs]
    return [[spec] for spec in ends[:prelude]] + blocks + [[spec] for spec in ends[end:]]


def set_pipeline_layout(config: TransformerConfig, depths: Sequence[int]) -> None:
    """Divide parts with the given unrolled depths into stages, unless `config` has a layout
    already.

    Raises:
        ValueError: there are more stages than parts.
    """
    size = config.pipeline_model_parallel_size
    is_given = (
        config.pipeline_model_parallel_layout,
        config.num_layers_in_first_pipeline_stage,
        config.num_layers_in_last_pipeline_stage,
    )
    if size == 1 or any(is_given):
        return
    rows = [["decoder"] * sum(stage) for stage in even_stages(depths, size)]
    rows[0].insert(0, "embedding")
    rows[-1] += ["mtp"] * (config.mtp_num_layers or 0) + ["loss"]
    config.pipeline_model_parallel_layout = PipelineParallelLayerLayout(rows, size)


def file_keys_alike(config: TransformerConfig) -> None:
    """Make every stage name its checkpoint keys as a stage with a RecursionLayer does.

    Megatron saves layers as slices of one tensor if they are all alike, which they are not if one
    of them is a recursion. A stage without a recursion does not know that by itself, and the keys
    of different stages would not match.
    """
    config.hetereogenous_dist_checkpoint = True


def check_whole(config: TransformerConfig, depths: Sequence[int], first: int, count: int) -> None:
    """Raise ValueError if a stage with the `count` layers from `first` on would split one of the
    parts.
    """
    borders = {0, *accumulate(depths)}
    if first in borders and first + count in borders:
        return
    num_stages = config.pipeline_model_parallel_size * (
        config.virtual_pipeline_model_parallel_size or 1
    )
    advice = "Put whole parts into stages with pipeline_model_parallel_layout"
    if num_stages > len(depths):
        advice += f": {len(depths)} stages at most."
    else:
        advice += f", for example {proposed_layout(depths, num_stages)!r}."
    raise ValueError(
        f"a pipeline stage of layers {first + 1} to {first + count} "
        f"(pipeline_model_parallel_size={config.pipeline_model_parallel_size}) splits a recursion: "
        f"the parts of the model have {', '.join(map(str, depths))} unrolled layers. {advice}"
    )


def proposed_layout(depths: Sequence[int], num_stages: int) -> str:
    """A `pipeline_model_parallel_layout` that keeps parts whole: '|' between stages, ',' between
    parts.
    """
    stages = even_stages(depths, num_stages)
    written = [",".join("t" if d == 1 else f"t*{d}" for d in stage) for stage in stages]
    return f"E{'|'.join(written)}L"


def final_norm(layer_spec: ModuleSpec) -> type:
    """The norm after the last layer: Transformer Engine's if the layers are Transformer Engine's."""
    if not (has_transformer_engine() and _is_transformer_engine(layer_spec)):
        return local_norm()
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _is_transformer_engine(layer_spec: ModuleSpec) -> bool:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    core = cast(Any, layer_spec.submodules).self_attention.submodules.core_attention
    return isinstance(core, type) and issubclass(core, TEDotProductAttention)
