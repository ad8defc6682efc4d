"""Megatron settings that cannot run with a recursion, refused before anything is built."""

from typing import Any

from megatron.core.enums import Fp8Recipe
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer import TransformerConfig

from mor_layers import RecursionConfig
from mor_layers.layers import MLP_PROJECTIONS
from mor_megatron.layers.graphs import graph_rules
from mor_megatron.parallel import (
    SEPARATE_LAYERS_RULES,
    Arrangement,
    Names,
    require_rules,
)
from mor_megatron.platform import has_transformer_engine


def validate(
    config: TransformerConfig, recursion: RecursionConfig, keeps_together: bool = True
) -> None:
    """Refuse settings with which a recursion would compute a wrong result or fail.

    Args:
        keeps_together: whether layers that tell one another which tokens they ran are on one stage, as
            `recursion_block_spec` lays them out.

    Raises:
        ValueError: for the first such setting, with the reason and what to use instead.
    """
    arrangement = Arrangement(
        config.num_layers, recursion, pipeline=config.pipeline_model_parallel_size
    )
    require_rules(arrangement, () if keeps_together else SEPARATE_LAYERS_RULES, Names())
    for is_wrong, given, reason in _rules(config, recursion):
        if is_wrong:
            raise ValueError(f"{given} cannot be used with a recursion: {reason}")


def _rules(config: TransformerConfig, recursion: RecursionConfig) -> list[tuple[bool, str, str]]:
    selective = config.recompute_modules if config.recompute_granularity == "selective" else []
    selective = selective or []
    has_moe = config.num_moe_experts is not None
    balancing = config.moe_router_load_balancing_type
    balancing = balancing if isinstance(balancing, list) else [balancing]
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    relaxed = () if recursion.relaxation is None else recursion.relaxation.projections
    relaxed_qkv = set(relaxed) & {"query", "key", "value"}
    is_dora = recursion.relaxation is not None and recursion.relaxation.kind == "dora"
    return [
        (
            recursion.adapter is not None,
            f"adapter={recursion.adapter}",
            "its projection and its initial state are those of the PyTorch model only. Use "
            "input_injection=True.",
        ),
        (
            recursion.exit_norm,
            "exit_norm=True",
            "the layers after it are the user's own. Leave it out, or use loop_norm=True.",
        ),
        (
            config.hybrid_context_parallel,
            "hybrid_context_parallel=True",
            "its groups change from sequence to sequence. Use hybrid_context_parallel=False.",
        ),
        (
            config.context_parallel_size > 1 and config.moe_expert_capacity_factor is not None,
            f"context_parallel_size={config.context_parallel_size} with "
            f"moe_expert_capacity_factor={config.moe_expert_capacity_factor}",
            "Megatron fills an expert over the tokens of one tensor-parallel group, not of the "
            "whole sequence. Leave the capacity out.",
        ),
        (
            config.multi_latent_attention and bool(relaxed_qkv),
            f"multi_latent_attention=True with Relaxation.projections={relaxed}",
            "its queries, keys and values are projected in two stages, for which there are no "
            "deltas. Use projections of 'output', 'gate', 'up' or 'down'.",
        ),
        (
            config.multi_latent_attention and config.apply_rope_fusion,
            "multi_latent_attention=True with apply_rope_fusion=True",
            "the fused kernel takes the row number as the position, but selected tokens keep their "
            "positions in the sequence. Use apply_rope_fusion=False.",
        ),
        (
            getattr(config, "cache_mla_latents", False),
            "cache_mla_latents=True",
            "it is for Megatron's dynamic inference, which a recursion does not support. Leave it "
            "out: Megatron's static inference context caches a recursion's latent rows anyway.",
        ),
        (
            config.attention_output_gate and bool(relaxed_qkv),
            f"attention_output_gate=True with Relaxation.projections={relaxed}",
            "the projection of queries, keys and values then makes gates too, for which there are no "
            "deltas. Use projections of 'output', 'gate', 'up' or 'down'.",
        ),
        (
            config.mtp_num_layers is not None and recursion.loop_loss is not None,
            f"mtp_num_layers={config.mtp_num_layers} with loop_loss",
            "its layers do not take the states of all loops as one batch. Leave one of them out.",
        ),
        (
            config.qk_clip or config.log_max_attention_logit,
            f"qk_clip={config.qk_clip}, log_max_attention_logit={config.log_max_attention_logit}",
            "Megatron looks for the largest logits in one attention per unrolled layer, and the "
            "steps would overwrite one another's. Leave both out.",
        ),
        (
            config.tp_comm_overlap,
            "tp_comm_overlap=True",
            "its buffers hold a fixed number of rows, but the steps run different numbers. Leave "
            "it out.",
        ),
        (
            config.overlap_moe_expert_parallel_comm,
            "overlap_moe_expert_parallel_comm=True",
            "its schedule splits plain layers into parts and would not see the steps. Leave it "
            "out.",
        ),
        (
            config.delay_wgrad_compute,
            "delay_wgrad_compute=True",
            "only the schedule of overlap_moe_expert_parallel_comm computes the delayed gradients, and "
            "it would not see the steps. Leave it out.",
        ),
        (
            config.overlap_dispatch_backward_with_experts_wgrad,
            "overlap_dispatch_backward_with_experts_wgrad=True",
            "Transformer Engine's experts queue the gradients of their weights, once for each step, "
            "and that they are taken in this order has not been verified on a GPU. Leave it out.",
        ),
        (
            config.fused_single_qkv_rope,
            "fused_single_qkv_rope=True",
            "its kernel takes the row number as the position, but selected tokens keep their positions "
            "in the sequence. Use apply_rope_fusion.",
        ),
        (
            config.moe_paged_stash,
            "moe_paged_stash=True",
            "it records a schedule of layers in the first batch, which has not been verified with "
            "layers that run several times. Use recompute_granularity instead.",
        ),
        (
            config.quant_recipe is not None,
            "quant_recipe",
            "it selects layers by name and number, which shared layers do not have in common with "
            "unrolled ones. Leave it out.",
        ),
        (
            bool(config.distribute_saved_activations),
            "distribute_saved_activations=True",
            "a recursion occupies several entries in the list of layers, and the empty ones "
            "return their input, which Megatron would split in place. Use sequence_parallel=True.",
        ),
        (
            has_moe and config.mlp_chunks_for_training > 1,
            f"mlp_chunks_for_training={config.mlp_chunks_for_training} with a mixture of experts",
            "Megatron passes chunks to the experts without the padding mask. Use 1.",
        ),
        *graph_rules(config, recursion),
        (
            bool(config.fp8) and config.fp8_recipe == Fp8Recipe.delayed,
            f"fp8={config.fp8!r} with fp8_recipe='delayed'",
            "a layer that runs twice within one context overwrites the maxima from which its next "
            "scale is computed. Use fp8_recipe='tensorwise', 'blockwise' or 'mxfp8'.",
        ),
        (
            bool(config.fp8 or config.fp4)
            and (config.sequence_parallel or config.context_parallel_size > 1),
            f"fp8={config.fp8!r}, fp4={config.fp4!r} with sequence or context parallelism",
            "selected rows are not yet spread over ranks in multiples of the quantization block. "
            "Use sequence_parallel=False and context_parallel_size=1, or bf16.",
        ),
        (
            config.fine_grained_activation_offloading,
            "fine_grained_activation_offloading=True",
            "what offloads attention is in a forward pass of Megatron's that a recursion replaces, so "
            "less would be offloaded than asked for. Use recompute_granularity instead.",
        ),
        (
            config.cpu_offloading,
            "cpu_offloading=True",
            "Transformer Engine offloads one entry in the list of layers after another, and a whole "
            "recursion is one entry, which would be fetched back at once. Use recompute_granularity "
            "instead.",
        ),
        (
            "layernorm" in selective and not has_transformer_engine(),
            "recompute_modules with 'layernorm' and no Transformer Engine",
            "Megatron's local layers raise a NameError there. Leave 'layernorm' out.",
        ),
        (
            "layernorm" in selective and not recursion.share_norms,
            "recompute_modules with 'layernorm' and share_norms=False",
            "a recomputed norm would be that of the last step. Leave 'layernorm' out.",
        ),
        (
            "layernorm" in selective and recursion.norm_modulation is not None,
            f"recompute_modules with 'layernorm' and norm_modulation={recursion.norm_modulation}",
            "a recomputed norm would be modulated as at the last step. Leave 'layernorm' out.",
        ),
        (
            "mlp" in selective and config.add_bias_linear and not has_moe,
            "recompute_modules with 'mlp' and add_bias_linear=True",
            "Megatron's recomputation of an MLP returns its bias, and the backward pass of that never "
            "ends, also without a recursion. Use recompute_granularity='full', or "
            "add_bias_linear=False.",
        ),
        (
            "mlp" in selective and bool(set(relaxed) & set(MLP_PROJECTIONS)),
            f"recompute_modules with 'mlp' and Relaxation.projections={relaxed}",
            "a recomputed MLP would be that of the last step. Use recompute_granularity='full', "
            "or leave 'mlp' out.",
        ),
        (
            "mlp" in selective and recursion.sandwich_norms and not recursion.share_norms,
            "recompute_modules with 'mlp', sandwich_norms=True and share_norms=False",
            "a recomputed norm would be that of the last step. Use recompute_granularity='full', "
            "or leave 'mlp' out.",
        ),
        (
            "mlp" in selective and "mlp" in recursion.own_per_step,
            f"recompute_modules with 'mlp' and own_per_step={recursion.own_per_step}",
            "a recomputed MLP would be the last step's. Use recompute_granularity='full', or leave "
            "'mlp' out.",
        ),
        (
            "gate" in relaxed and not config.gated_linear_unit,
            "Relaxation.projections with 'gate' and gated_linear_unit=False",
            "the MLP has no gate. Leave 'gate' out of projections.",
        ),
        (
            bool(relaxed_qkv)
            and config.num_query_groups is not None
            and config.num_query_groups < config.tensor_model_parallel_size,
            f"num_query_groups={config.num_query_groups} with tensor_model_parallel_size="
            f"{config.tensor_model_parallel_size} and deltas of {', '.join(sorted(relaxed_qkv))}",
            "a rank has no complete projection to add a delta to. Use at least as many groups as "
            "ranks, or other Relaxation.projections.",
        ),
        (
            bool(relaxed_qkv) and is_dora and (config.add_bias_linear or config.add_qkv_bias),
            "Relaxation.kind='dora' of query, key or value with biases",
            "Megatron adds the bias before the magnitude can be applied. Use kind='lora', or "
            "other Relaxation.projections.",
        ),
        (
            interleaved and config.batch_p2p_comm,
            f"virtual_pipeline_model_parallel_size={config.virtual_pipeline_model_parallel_size} "
            "with batch_p2p_comm=True",
            "with two stages the previous and the next rank are the same, and batched sends are "
            "mixed up, which silently gives wrong losses. Set overlap_p2p_comm=True, "
            "batch_p2p_comm=False.",
        ),
        (
            config.variable_seq_lengths
            and config.moe_token_dispatcher_type != "alltoall"
            and recursion.loop_loss is None,  # which varies the batch, and alike on all ranks
            f"variable_seq_lengths=True with moe_token_dispatcher_type="
            f"{config.moe_token_dispatcher_type!r}",
            "Megatron requires moe_token_dispatcher_type='alltoall' with it, even for a dense "
            "model.",
        ),
        (
            has_moe and "quantile_balancing" in balancing,
            "moe_router_load_balancing_type='quantile_balancing'",
            "Megatron does not implement it with padding. Use 'aux_loss' or an expert bias.",
        ),
        (
            has_moe and config.moe_pad_expert_input_to_capacity,
            "moe_pad_expert_input_to_capacity=True",
            "steps and ranks run different numbers of tokens. Leave it out.",
        ),
        (
            recursion.mean_experts is not None
            and (config.moe_router_score_function != "softmax" or "seq_aux_loss" in balancing),
            f"mean_experts with moe_router_score_function={config.moe_router_score_function!r} and "
            f"moe_router_load_balancing_type={config.moe_router_load_balancing_type!r}",
            "the threshold applies to softmax probabilities. Use 'softmax', and 'aux_loss' or "
            "'none'.",
        ),
        (
            recursion.mean_experts is not None
            and not 1 <= max(recursion.mean_experts) <= config.moe_router_topk > 1,
            f"mean_experts={recursion.mean_experts} with moe_router_topk={config.moe_router_topk}",
            "moe_router_topk is the maximum for a token. It must be at least 2 and at least the "
            "largest mean.",
        ),
    ]


def require_room_for_all_loops(config: TransformerConfig) -> None:
    """Raise ValueError if the stages after a recursion would expect the states of a single loop."""
    if config.pipeline_model_parallel_size == 1:
        return
    if config.virtual_pipeline_model_parallel_size is not None:
        raise ValueError(
            "loop_loss cannot be used with a recursion inside one of several virtual stages: Megatron's "
            "interleaved schedule receives tensors before it knows their size. Set "
            "virtual_pipeline_model_parallel_size=None, or use recursion_pipeline_spec."
        )
    if not config.variable_seq_lengths:
        raise ValueError(
            "loop_loss with pipeline parallelism sends the states of all loops to the stages after the "
            "recursion, which variable_seq_lengths=False gives no room for. Set "
            "variable_seq_lengths=True on all stages, as recursion_block_spec does."
        )


def require_static_generation(config: TransformerConfig, context: Any) -> None:
    """Raise ValueError if a recursion cannot generate with this inference context or config."""
    if not isinstance(context, StaticInferenceContext):
        raise ValueError(
            f"a recursion generates with a StaticInferenceContext, not with a "
            f"{type(context).__name__}: Megatron's pages have a row of every token in every layer, "
            "and its kernels read all of them, but a token has no rows at steps after its exit. "
            "For continuous batching use mor_layers.generation.DepthBatchingEngine with the model "
            "that mor_megatron.checkpoints.torch_model makes of this one."
        )
    if config.sequence_parallel:
        raise ValueError(
            "a recursion generates with sequence_parallel=False, not with sequence_parallel=True, "
            "because the next token of a sequence cannot be spread over ranks. Turn it off in the "
            "config, or use mor_layers.generation.DepthBatchingEngine (see "
            "mor_megatron.checkpoints.torch_model)."
        )
