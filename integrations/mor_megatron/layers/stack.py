"""The layers of a recursion block: ordinary Megatron layers, built once from the user's own spec.

Legend: `k` tokens that run a step, `b` batch, `h` hidden; under sequence parallelism a rank holds
`k / tp` of the rows.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from mor_layers import RecursionConfig, StepContext
from mor_megatron.layers.attention.core import SDPACoreAttention, window_of
from mor_megatron.layers.attention.grouped_query import RecursiveSelfAttention
from mor_megatron.layers.attention.latent import LatentAttention, RecursiveLatentAttention
from mor_megatron.layers.block_part import BlockPart
from mor_megatron.layers.experts.moe import RecursiveMoELayer
from mor_megatron.layers.experts.padding import PaddedMoELayer, PaddedTopKRouter
from mor_megatron.layers.experts.router import StepTopKRouter
from mor_megatron.layers.quantization import filled, row_alignment
from mor_megatron.layers.sublayers.modulation import attach_modulation
from mor_megatron.layers.sublayers.per_step import StepModules, attentions_of, give_own_sublayers
from mor_megatron.layers.sublayers.relaxation import attach_deltas
from mor_megatron.layers.sublayers.sandwich import (
    attach_output_norms,
    like_norms_of,
    scale_branches,
)
from mor_megatron.layers.sublayers.step_aware import StepAware
from mor_megatron.step import (
    CachedStep,
    GatheredStep,
    StaticCache,
    StepRotation,
    packed,
    shard_of_padding,
)


class StepStack(nn.ModuleList):
    """The `K` Megatron layers that run as one step of a recursion.

    Args:
        config: the model's configuration.
        layer_specs: the user's specs of the layers on this rank.
        recursion: the number of steps, and what they share.
        part: which layers of the block these are.
        first_layer: number of layers of the unrolled model before the block.
        pg_collection: the model's process groups.
        vp_stage: virtual pipeline stage of the block.

    Raises:
        ValueError: a spec cannot run inside a recursion.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_specs: Sequence[ModuleSpec],
        recursion: RecursionConfig,
        part: BlockPart,
        first_layer: int,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None,
    ) -> None:
        super().__init__()
        inner = inner_config(config, recursion.num_recursions)
        first_layer += part.first
        require_alike_steps(
            config, first_layer, len(layer_specs), part.block_size, recursion.num_recursions
        )
        self.first_layer = first_layer
        self.row_alignment = row_alignment(config)
        self.layers_per_step = part.block_size
        self.tp_group = pg_collection.tp if config.sequence_parallel else None
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        for index, user_spec in enumerate(layer_specs):
            build = partial(
                build_module,
                config=inner,
                layer_number=first_layer + index + 1,
                pg_collection=pg_collection,
                vp_stage=vp_stage,
                add_layer_offset=False,
            )
            spec = recursive_layer_spec(user_spec, recursion, _needs_own_core(config))
            layer = build(spec)
            self.append(layer)
            give_own_sublayers(layer, spec, recursion, build)
            for attention in attentions_of(layer):
                attention.join_block(index, cast(Any, layer).input_layernorm)
            if recursion.relaxation is not None:
                attach_deltas(layer, recursion.relaxation, recursion.num_recursions, config)
            if recursion.norm_modulation is not None:
                attach_modulation(layer, recursion.norm_modulation, config)
            if recursion.sandwich_norms:
                norm = like_norms_of(user_spec, config)
                attach_output_norms(layer, _of_every_step(norm, recursion))
            factor = recursion.residual_factor(part.block_size)
            if factor is not None:
                scale_branches(layer, factor)
        self._step_aware = [
            [m for m in layer.modules() if isinstance(m, StepAware)] for layer in self
        ]

    def forward(
        self,
        hidden: Tensor,
        context: StepContext,
        rotation: StepRotation | None = None,
        cache: StaticCache | None = None,
        num_documents: int | None = None,
    ) -> Tensor:
        """`[k b h] -> [k b h]`.

        Args:
            rotation: rotary table of the whole sequence, if the model has rotary positions.
            cache: the keys and values of earlier tokens, in generation.
            num_documents: upper bound on the documents of a sequence, if known to be more than one.
        """
        sequences = packed(context, num_documents)
        if cache is not None:
            context = CachedStep.of(context, cache)
        if self.cp_group is not None:
            shards = 1 if self.tp_group is None else self.tp_group.size()
            multiple = self.cp_group.size() * shards
            context = GatheredStep.of(context, self.cp_group, multiple)
        if rotation is not None:
            rotation = rotation.at(context.projected_positions)
        is_padding = context.tokens.is_padding
        if self.tp_group is not None:
            is_padding = shard_of_padding(context.tokens, self.tp_group)
        count, hidden = len(hidden), filled(hidden, self.row_alignment)
        if extra := len(hidden) - count:
            if is_padding is None:
                is_padding = hidden.new_zeros(count, hidden.shape[1]).bool()
            is_padding = F.pad(is_padding, (0, 0, 0, extra), value=True)
        for index, layer in enumerate(self):
            layer_number = self.first_layer + context.step * self.layers_per_step + index + 1
            for module in self._step_aware[index]:
                module.begin_step(context.step, layer_number)
            # Megatron fixes the arguments of a layer, and none of them is meant for what a
            # recursion's attention must know. Two of them are passed on to self-attention without
            # being looked at: the context travels in the place of the attention mask that it stands
            # for, and the rotation of these rows in that of the rotary table.
            # `RecursiveSelfAttention.forward` unpacks both.
            hidden, _ = layer(
                hidden_states=hidden,
                attention_mask=context,
                rotary_pos_emb=rotation,
                packed_seq_params=sequences,
                padding_mask=None if is_padding is None else is_padding.T,
            )
        return hidden[:count] if extra else hidden


def inner_config(config: TransformerConfig, num_recursions: int) -> TransformerConfig:
    """The configuration of layers that run `num_recursions` times.

    Expert routers read the coefficients of their auxiliary losses from it, and divide by the same
    coefficients for the log. The coefficients are divided by the number of steps, so that a layer's
    losses count once in total and each step's loss is logged at full size.

    Padding goes to no expert, so the number of rows that experts receive is only known at run time.
    Megatron's dispatchers count them only if a capacity is configured, and otherwise expect `topk`
    per row. Where the user sets no capacity, it is therefore set so high that no token is dropped.

    The linear layers of Transformer Engine cache the quantized weight of a batch's first forward
    pass. If they also accumulate into `main_grad` themselves, that pass **overwrites** the
    gradient. In a layer that runs several times, the first pass is the last in the backward pass
    and would erase the gradients of the others. Without the cache they do neither.
    """
    inner = copy.copy(config)
    inner.disable_parameter_transpose_cache = True
    inner.cuda_graph_impl = "none"  # the recursion is captured as a whole
    if config.num_moe_experts is not None and config.moe_expert_capacity_factor is None:
        inner.moe_expert_capacity_factor = float(config.num_moe_experts)
    coefficient = config.moe_aux_loss_coeff
    if isinstance(coefficient, list):
        inner.moe_aux_loss_coeff = [c / num_recursions for c in coefficient]
    else:
        inner.moe_aux_loss_coeff = coefficient / num_recursions
    if config.moe_z_loss_coeff is not None:
        inner.moe_z_loss_coeff = config.moe_z_loss_coeff / num_recursions
    return inner


def recursive_layer_spec(
    spec: ModuleSpec, recursion: RecursionConfig, replaces_core: bool = False
) -> ModuleSpec:
    """The user's layer spec with those parts replaced that must know about the recursion.

    Attention becomes `RecursiveSelfAttention` or `RecursiveLatentAttention` (using
    `SDPACoreAttention` instead of Megatron's local core attention) and a mixture of experts becomes
    `RecursiveMoELayer`. Parameters and their names stay.

    Args:
        replaces_core: whether the user's core attention is replaced even if it is not Megatron's local
            one (see `_needs_own_core`).

    Raises:
        ValueError: the layer has another attention than these two, or it has cross-attention.
    """
    if not (isinstance(spec.module, type) and issubclass(spec.module, TransformerLayer)):
        raise ValueError(
            f"a recursion runs TransformerLayers, not {spec.module!r}. Use a spec such as "
            "get_gpt_layer_local_spec() or get_gpt_layer_with_transformer_engine_spec()."
        )
    parts = cast(Any, spec.submodules)
    attention = parts.self_attention
    if not isinstance(attention, ModuleSpec) or attention.module not in _ATTENTIONS:
        raise ValueError(
            f"a recursion runs layers with SelfAttention or MLASelfAttention, not {attention!r}. "
            "Other attentions compute the positions of tokens themselves, which is wrong for "
            "selected tokens. A FusedMLASelfAttention (mla_down_proj_fusion) computes the same as "
            "MLASelfAttention, which also projects only what a step needs."
        )
    if parts.cross_attention is not IdentityOp:
        raise ValueError(
            "a recursion cannot contain cross-attention, which does not know the positions of "
            "selected tokens. Put such layers before or after the recursion."
        )
    attention_parts = cast(Any, attention.submodules)
    if replaces_core or attention_parts.core_attention is DotProductAttention:
        attention_parts = replace(attention_parts, core_attention=SDPACoreAttention)
    changes: dict[str, Any] = {
        "self_attention": replace(
            attention, module=_ATTENTIONS[attention.module], submodules=attention_parts
        ),
        "mlp": _recursive_mlp(parts.mlp, recursion),
    }
    if not recursion.share_norms:
        for name in ("input_layernorm", "pre_mlp_layernorm"):
            changes[name] = partial(
                _step_norms, getattr(parts, name), recursion.num_recursions, name
            )
    return replace(spec, submodules=replace(parts, **changes))


def _needs_own_core(config: TransformerConfig) -> bool:
    """Whether the user's core attention would take rows of a step for something else.

    With context parallelism it would take the keys of all ranks for its own shard, and gather them
    again. With a window it would count rows, not positions. Sinks are a parameter of the core
    attention, of which a layer has one.
    """
    return (
        config.context_parallel_size > 1
        or config.window_size is not None
        or config.softmax_type != "vanilla"
    )


def require_alike_steps(
    config: TransformerConfig, first_layer: int, count: int, per_step: int, num_steps: int
) -> None:
    """Raise ValueError if attention of a shared layer would be another one at different steps.

    Args:
        first_layer: number of layers of the unrolled model before those on this rank.
        count: the layers on this rank.
        per_step: layers of the whole block.
    """
    rope = config.no_rope_freq
    kinds: dict[str, Callable[[int], Any]] = {
        "no_rope_freq": lambda number: bool(rope) and bool(rope[number - 1]),  # type: ignore[index]
        "window_attn_skip_freq": lambda number: window_of(config, number),
    }
    for name, kind in kinds.items():
        for number in range(first_layer + 1, first_layer + count + 1):
            for other in range(number, number + per_step * num_steps, per_step):
                if kind(other) != kind(number):
                    raise ValueError(
                        f"{name}={getattr(config, name)} makes unrolled layers {number} and {other} "
                        "(1-based) different, but they are the same shared layer, which has one "
                        f"attention. Use the same value for all {num_steps} steps."
                    )


_ATTENTIONS: dict[Any, type] = {
    SelfAttention: RecursiveSelfAttention,
    LatentAttention: RecursiveLatentAttention,
    MLASelfAttention: RecursiveLatentAttention,
}


def _recursive_mlp(builder: Any, recursion: RecursionConfig) -> Any:
    is_moe = isinstance(builder, partial) and builder.func in (MoELayer, PaddedMoELayer)
    recursion.require_experts(is_moe)
    if not is_moe:
        return builder
    parts = builder.keywords["submodules"]
    if parts.router not in (TopKRouter, PaddedTopKRouter):
        raise ValueError(
            f"a mixture of experts inside a recursion needs Megatron's TopKRouter, "
            f"not {parts.router!r}."
        )
    return partial(
        RecursiveMoELayer,
        submodules=replace(parts, router=StepTopKRouter),
        recursion=recursion,
        **{name: value for name, value in builder.keywords.items() if name != "submodules"},
    )


def _of_every_step(norm: Callable[[], nn.Module], recursion: RecursionConfig) -> Any:
    """Builds one norm for all steps, or one for each."""
    if recursion.share_norms:
        return norm
    return lambda: StepModules(norm() for _ in range(recursion.num_recursions))


def _step_norms(builder: Any, num_recursions: int, place: str, **arguments: Any) -> StepModules:
    if builder is IdentityOp:
        raise ValueError(
            f"share_norms=False needs a separate norm at {place}; this layer spec fuses it into "
            "the next linear layer. Use a local layer spec, or share_norms=True."
        )
    return StepModules(builder(**arguments) for _ in range(num_recursions))
