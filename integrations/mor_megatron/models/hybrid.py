"""Recursions in Megatron's HybridModel, the announced successor to GPTModel, with or without
Transformer Engine.

    pattern = HybridPattern.parse("*-[*-*E]x3*-")
    recursion = RecursionConfig(3, router=ExpertChoice())
    model = HybridModel(
        config,
        recursion_hybrid_spec(config, pattern, recursion),
        hybrid_layer_pattern=pattern.unrolled,
        position_embedding_type="rope",
        ...
    )

A hybrid model counts attention and MLP as one layer each. One step of `[*-*E]` is built as two
ordinary transformer layers, an attention with an MLP and an attention with experts, which computes
the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import get_pg_rank
from torch import nn

from mor_layers import RecursionConfig
from mor_megatron.layers import AbsorbedLayer, RecursionLayer
from mor_megatron.models.gpt import default_layer_spec, final_norm, recursion_layer_spec
from mor_megatron.models.hybrid_pattern import SYMBOLS, HybridPattern


@dataclass(frozen=True)
class RecursiveHybridSubmodules:
    """The specs from which a RecursiveHybridStack builds its layers."""

    pattern: HybridPattern
    """The layers of the whole model."""
    layer_specs: tuple[ModuleSpec, ...]
    """Specs for all stages, one for each symbol of the unrolled pattern."""
    final_norm: type
    """The norm after the last layer."""
    mtp_block_spec: None = None
    """HybridModel reads this; None means no multi-token prediction."""


class RecursiveHybridStack(HybridStack):
    """A HybridStack with recursions in it, for use as `hybrid_stack_spec` of a HybridModel.

    Its forward pass, recomputation and checkpoint keys are those of HybridStack.

    Args:
        config: the model's configuration.
        submodules: the result of `recursion_hybrid_spec`.
        layer_type_list: symbols of this stage's layers, set by HybridModel.
        pp_layer_offset: number of layers on earlier stages.

    Raises:
        ValueError: the pattern of the model differs from that of the spec.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: RecursiveHybridSubmodules,
        pre_process: bool = True,
        layer_type_list: Sequence[str] = (),
        pp_layer_offset: int = 0,
        post_layer_norm: bool = True,
        post_process: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        pattern, given = submodules.pattern, "".join(layer_type_list)
        stages = pattern.unrolled.split("|")
        known = list(zip(_offsets(stages), stages, strict=True))
        if (pp_layer_offset, given) not in known:
            raise ValueError(
                f"layers {given!r} from {pp_layer_offset + 1} on are not a stage of "
                f"{str(pattern)!r}. Build the HybridModel with "
                f"hybrid_layer_pattern={pattern.unrolled!r}."
            )
        # HybridStack itself builds no layers and no norm here, because its own ones need
        # Transformer Engine.
        super().__init__(
            config,
            HybridStackSubmodules(),
            pre_process=pre_process,
            layer_type_list=[],
            pp_layer_offset=pp_layer_offset,
            post_layer_norm=False,
            post_process=post_process,
            pg_collection=cast(Any, pg_collection),
        )
        self.layer_type_list, self.post_layer_norm = list(given), post_layer_norm
        stop = pp_layer_offset + len(given)
        self.layers = nn.ModuleList(
            self._build(spec, symbol, index, pp_layer_offset)
            for index, (symbol, spec) in enumerate(
                zip(given, submodules.layer_specs[pp_layer_offset:stop], strict=True)
            )
        )
        self.num_layers_per_pipeline_rank = len(self.layers)
        if post_process and post_layer_norm:
            self.final_norm = submodules.final_norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )

    def _build(self, spec: ModuleSpec, symbol: str, index: int, offset: int) -> Any:
        number = index + 1 + offset
        common = {"config": self.config, "pg_collection": self.pg_collection}
        if spec.module in (RecursionLayer, AbsorbedLayer):
            # These layers add the offset of their stage themselves.
            own = get_transformer_layer_offset(self.config, None, get_pg_rank(self.pp_group))
            return build_module(spec, layer_number=number - own, **common)
        if symbol == "M":
            return build_module(spec, layer_number=number, pp_layer_offset=offset, **common)
        place = {"pp_layer_offset": offset} if symbol in "*D+" else {}
        return build_module(spec, layer_number=number, add_layer_offset=False, **place, **common)


def recursion_hybrid_spec(
    config: TransformerConfig,
    pattern: HybridPattern,
    recursions: RecursionConfig | Sequence[RecursionConfig],
    layers: HybridStackSubmodules | None = None,
) -> ModuleSpec:
    """The `hybrid_stack_spec` of a HybridModel whose `hybrid_layer_pattern` is `pattern.unrolled`.

    Args:
        config: `num_layers` must be `pattern.num_layers`. If the pattern has several stages,
            `pipeline_model_parallel_layout` is set accordingly.
        pattern: the layers, with recursions in brackets.
        recursions: router, KV policy and norms, for all recursions or one per recursion.
            `num_recursions` must match the pattern; `sharing` is ignored.
        layers: specs by symbol, such as those of Megatron's `hybrid_stack_spec`. Default:
            `default_hybrid_layers(config)`.

    Raises:
        ValueError: numbers contradict one another, a symbol has no spec, or the settings cannot
            run.
    """
    configs = _matching(pattern, recursions)
    _check(config, pattern)
    layers = layers or default_hybrid_layers(config)
    remaining = iter(configs)
    specs: list[ModuleSpec] = []
    for part in pattern.parts:
        if part.num_recursions is None:
            specs.append(_spec_of(layers, part.symbols))
            continue
        block = [_whole_layer(layers, symbols) for symbols in part.layers]
        specs.append(recursion_layer_spec(block, next(remaining)))
        specs += [ModuleSpec(module=AbsorbedLayer)] * (len(part.unrolled) - 1)
    norm = final_norm(_spec_of(layers, "*"))
    submodules = RecursiveHybridSubmodules(pattern, tuple(specs), norm)
    return ModuleSpec(module=RecursiveHybridStack, submodules=cast(Any, submodules))


def default_hybrid_layers(config: TransformerConfig) -> HybridStackSubmodules:
    """Attention, MLP and experts from `default_layer_spec`, each as a separate layer."""
    dense = default_layer_spec(config, is_moe=False)
    parts = cast(Any, dense.submodules)
    no_attention = {
        "input_layernorm": IdentityOp,
        "self_attention": IdentityOp,
        "self_attn_bda": IdentityFuncOp,
    }
    no_mlp = {"pre_mlp_layernorm": IdentityOp, "mlp": IdentityOp, "mlp_bda": IdentityFuncOp}
    moe: Any = IdentityOp
    if config.num_moe_experts is not None:
        spec = default_layer_spec(config, is_moe=True)
        moe = replace(spec, submodules=replace(cast(Any, spec.submodules), **no_attention))
    return HybridStackSubmodules(
        attention_layer=replace(dense, submodules=replace(parts, **no_mlp)),
        mlp_layer=replace(dense, submodules=replace(parts, **no_attention)),
        moe_layer=moe,
    )


def _matching(
    pattern: HybridPattern, recursions: RecursionConfig | Sequence[RecursionConfig]
) -> list[RecursionConfig]:
    """One RecursionConfig for each recursion of the pattern."""
    blocks = pattern.recursions
    is_one = isinstance(recursions, RecursionConfig)
    configs = [recursions] * len(blocks) if is_one else list(recursions)
    if not blocks or len(configs) != len(blocks):
        raise ValueError(
            f"pattern {str(pattern)!r} has {len(blocks)} recursions, but {len(configs)} "
            "RecursionConfigs are given. Write recursions in brackets, [*-]x3, and give one "
            "RecursionConfig for all of them or one for each."
        )
    for block, config in zip(blocks, configs, strict=True):
        if block.num_recursions != config.num_recursions:
            raise ValueError(
                f"{block} runs {block.num_recursions} times, but its RecursionConfig has "
                f"num_recursions={config.num_recursions}. They must agree."
            )
    return configs


def _check(config: TransformerConfig, pattern: HybridPattern) -> None:
    if config.num_layers != pattern.num_layers:
        raise ValueError(
            f"pattern {str(pattern)!r} unrolls to {pattern.num_layers} layers, because a hybrid "
            f"model counts attention and MLP as a layer each. Set num_layers={pattern.num_layers}, "
            f"not {config.num_layers}."
        )
    if config.fp8 or config.fp4:
        raise ValueError(
            f"fp8={config.fp8!r}, fp4={config.fp4!r}: a hybrid stack with recursions supports "
            "neither. Use bf16."
        )
    size = config.pipeline_model_parallel_size
    if config.virtual_pipeline_model_parallel_size is not None or size != len(pattern.stages):
        raise ValueError(
            f"pattern {str(pattern)!r} has {len(pattern.stages)} stages, but "
            f"pipeline_model_parallel_size={size} and "
            f"virtual_pipeline_model_parallel_size={config.virtual_pipeline_model_parallel_size}. "
            "Write '|' between the stages, as many as there are ranks, and use no virtual stages."
        )
    if size > 1:
        rows = [["decoder"] * sum(len(p.unrolled) for p in stage) for stage in pattern.stages]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        config.pipeline_model_parallel_layout = PipelineParallelLayerLayout(rows, size)


def _spec_of(layers: HybridStackSubmodules, symbol: str) -> ModuleSpec:
    fields = {
        "*": layers.attention_layer,
        "-": layers.mlp_layer,
        "E": layers.moe_layer,
        "M": layers.mamba_layer,
        "G": layers.gdn_layer,
        "D": layers.dsa_layer,
        "+": layers.mla_layer,
    }
    spec = fields[symbol]
    if not isinstance(spec, ModuleSpec):
        raise ValueError(
            f"there is no spec for {symbol!r} ({SYMBOLS[symbol]}). "
            + (
                "Set num_moe_experts."
                if symbol == "E"
                else "Give `layers`, such as Megatron's hybrid_stack_spec.submodules."
            )
        )
    return spec


def _whole_layer(layers: HybridStackSubmodules, symbols: str) -> ModuleSpec:
    """`*-` as one TransformerLayer: the attention of the first symbol and the MLP of the second."""
    attention = _spec_of(layers, "*")
    if len(symbols) == 1:
        return attention
    mlp = cast(Any, _spec_of(layers, symbols[1]).submodules)
    parts = replace(
        cast(Any, attention.submodules),
        pre_mlp_layernorm=mlp.pre_mlp_layernorm,
        mlp=mlp.mlp,
        mlp_bda=mlp.mlp_bda,
    )
    return replace(attention, submodules=parts)


def _offsets(stages: Sequence[str]) -> list[int]:
    return [sum(map(len, stages[:index])) for index in range(len(stages))]
