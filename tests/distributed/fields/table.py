"""What each field of TransformerConfig does to a recursion: data.

A field is in exactly one of four tables. `EQUAL` and `WITHOUT_EFFECT` hold values to try: under each, a
recursion of fixed depth computes what Megatron's own unrolled layers compute, see `comparison`. A
value in `EQUAL` changes what plain layers compute, or how (recomputation, dispatchers); one in
`WITHOUT_EFFECT` does not on a CPU, which is compared too. `REFUSED` holds values that a recursion does
not take, with a part of what it says. `NOT_RUN` says why one process on a CPU tells nothing of a field.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor

from tests.distributed.fields.comparison import DENSE, MOE


@dataclass(frozen=True)
class Trial:
    """A value to try."""

    value: Any
    given: dict[str, Any] = field(default_factory=dict)
    """Other fields, without which it is illegal or idle."""
    base: dict[str, Any] = field(default_factory=lambda: DENSE)
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of GPTModel."""
    is_initial: bool = False
    """Whether the weights stay as the models made them."""
    tolerance: float = 2e-6
    """Of a token's loss."""
    gradient_tolerance: float = 1e-5
    """Relative to the largest gradient of the same parameter."""
    says: str = ""
    """A part of the error, where it is refused."""
    note: str = ""
    """For the page."""


def dense(value: Any, note: str = "", **given: Any) -> Trial:
    """A value in a model without experts."""
    return Trial(value, given, note=note)


def moe(value: Any, note: str = "", **given: Any) -> Trial:
    """A value in a model with experts."""
    return Trial(value, given, MOE, note=note)


def refused(value: Any, says: str, **given: Any) -> Trial:
    """A value that a recursion in a dense model does not take."""
    return Trial(value, given, says=says)


def refused_moe(value: Any, says: str, **given: Any) -> Trial:
    """A value that a recursion with experts does not take."""
    return Trial(value, given, MOE, says=says)


def constant(value: float) -> Callable[[Tensor], Tensor]:
    """Fills a weight."""
    return lambda weight: weight.fill_(value)


SHARED = {"moe_shared_expert_intermediate_size": 32}
SIGMOID = {"moe_router_score_function": "sigmoid"}
MTP = {"mtp_num_layers": 2}
MUP = {"use_mup": True, "mup_base_hidden_size": 16}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
CONSTANT = {"init_method": constant(0.02), "output_layer_init_method": constant(0.05)}
ROUNDING = {"tolerance": 2e-2, "gradient_tolerance": 0.1, "note": "up to its rounding"}

EQUAL: dict[str, Trial] = {
    "activation_func": dense(F.gelu),
    "activation_func_clamp_value": dense(0.1, activation_func=quick_gelu),
    "add_bias_linear": dense(True),
    "add_qkv_bias": dense(True),
    "attention_dropout": dense(0.2, "the same draws where both draw alike: on a CPU they do"),
    "bf16": Trial(True, {"params_dtype": torch.bfloat16}, **ROUNDING),
    "bias_activation_fusion": dense(True, add_bias_linear=True),
    "cross_entropy_loss_fusion": Trial(
        True, gradient_tolerance=5e-4, note="Megatron rounds its gradient to bf16"
    ),
    "embedding_init_method": Trial(constant(0.03), CONSTANT, is_initial=True),
    "embedding_init_method_std": Trial(0.0, CONSTANT, is_initial=True),
    "ffn_hidden_size": dense(80),
    "fp16": Trial(True, {"params_dtype": torch.float16}, **ROUNDING),
    "gated_linear_unit": dense(False),
    "glu_linear_offset": dense(1.0),
    "grad_scale_func": dense(lambda loss: 8 * loss),
    "hidden_dropout": dense(0.2),
    "hidden_size": dense(48),
    "init_method": Trial(
        constant(0.02), {"output_layer_init_method": constant(0.05)}, is_initial=True
    ),
    "init_method_std": Trial(0.0, is_initial=True),
    "kv_channels": dense(16),
    "layernorm_epsilon": dense(0.1),
    "moe_apply_probs_on_input": moe(True, moe_router_topk=1, moe_router_pre_softmax=True),
    "moe_aux_loss_coeff": moe(0.1, "a shared layer's weighs as much as any layer's"),
    "moe_expert_capacity_factor": moe(1.0),
    "moe_ffn_hidden_size": moe(24),
    "moe_grad_scale_func": moe(lambda: torch.tensor(4.0), moe_aux_loss_coeff=0.1),
    "moe_input_jitter_eps": moe(0.1),
    "moe_layer_freq": moe([0, *[0, 1] * 3, 1], "alike in all steps; refused otherwise"),
    "moe_router_bias_update_rate": moe(
        0.5, "one bias for each step", moe_router_enable_expert_bias=True, **SIGMOID
    ),
    "moe_router_enable_expert_bias": moe(True, "one bias for each step", **SIGMOID),
    "moe_router_force_biased": moe(0.5),
    "moe_router_force_load_balancing": moe(True),
    "moe_router_group_topk": moe(1, moe_router_num_groups=2, **SIGMOID),
    "moe_router_load_balancing_type": moe(
        ["aux_loss", "seq_aux_loss"],
        "also 'sinkhorn' and 'none'; 'global_aux_loss' and 'quantile_balancing' are refused",
        moe_aux_loss_coeff=[0.1, 0.2],
    ),
    "moe_router_num_groups": moe(2, moe_router_group_topk=1, **SIGMOID),
    "moe_router_pre_softmax": moe(True),
    "moe_router_score_function": moe("sigmoid"),
    "moe_router_topk": moe(3),
    "moe_router_topk_scaling_factor": moe(2.5),
    "moe_shared_expert_gate": moe(True, **SHARED),
    "moe_shared_expert_intermediate_size": moe(32),
    "moe_shared_expert_overlap": moe(True, **SHARED),
    "moe_z_loss_coeff": moe(0.1),
    "mrope_section": Trial([1, 1, 2], model={"position_embedding_type": "mrope"}),
    "mtp_detach_heads": dense(True, **MTP),
    "mtp_grad_scale_func": dense(lambda: torch.tensor(4.0), **MTP),
    "mtp_loss_scaling_factor": dense(0.7, **MTP),
    "mtp_num_layers": dense(
        2,
        "refused where a replica is spread over ranks; folders of weights leave its heads out",
    ),
    "mtp_use_repeated_layer": dense(True, **MTP),
    "mup_attn_scale_power": dense(0.5, **MUP),
    "mup_base_head_dim": dense(4, mup_attn_scale_power=0.5, **MUP),
    "mup_base_hidden_size": dense(8, use_mup=True),
    "mup_embedding_mult": dense(2.0, **MUP),
    "mup_output_mult": dense(0.5, **MUP),
    "normalization": dense("LayerNorm"),
    "num_attention_heads": dense(8),
    "num_moe_experts": Trial(4, {"moe_router_topk": 2, "moe_ffn_hidden_size": 48}),
    "num_query_groups": dense(1),
    "output_layer_init_method": Trial(
        constant(0.05), {"init_method": constant(0.02)}, is_initial=True
    ),
    "params_dtype": Trial(torch.bfloat16, {"bf16": True}, **ROUNDING),
    "qk_l2_norm": dense(True),
    "qk_layernorm": dense(True),
    "softmax_scale": dense(0.5),
    "use_mup": dense(True, mup_base_hidden_size=16),
}

WITHOUT_EFFECT: dict[str, Trial] = {
    "activation_func_fp8_input_store": dense(True, "only kernels of Transformer Engine read it"),
    "apply_residual_connection_post_layernorm": dense(True, "nothing in Megatron-Core reads it"),
    "attention_backend": dense(AttnBackend.unfused, "it chooses between Transformer Engine's"),
    "attention_softmax_in_fp32": dense(False, "the model is in fp32 already"),
    "barrier_with_L1_time": dense(False, "timers only"),
    "bias_dropout_fusion": dense(True, "the same arithmetic, compiled"),
    "calculate_per_token_loss": dense(
        True, "sequences are of one length, so the mean is the same; refused with experts"
    ),
    "clone_scatter_output_in_embedding": dense(False, "memory only, under sequence parallelism"),
    "cp_comm_type": dense("a2a", "a recursion gathers keys itself"),
    "cuda_graph_modules": dense(["attn"], "there is no graph: cuda_graph_impl is refused"),
    "cuda_graph_retain_backward_graph": dense(True, "there is no graph"),
    "cuda_graph_scope": dense("attn", "there is no graph"),
    "cuda_graph_use_single_mempool": dense(False, "there is no graph"),
    "cuda_graph_warmup_steps": dense(5, "there is no graph"),
    "deallocate_pipeline_outputs": dense(True, "one stage sends nothing"),
    "deterministic_mode": dense(True, "it refuses kernels that a CPU does not have"),
    "disable_bf16_reduced_precision_matmul": dense(True, "a switch of cuBLAS"),
    "disable_parameter_transpose_cache": dense(True, "inner layers always have it set"),
    "flash_decode": dense(True, "generation only"),
    "fp32_residual_connection": dense(True, "with bf16, plain layers do not run on a CPU either"),
    "fused_residual_rmsnorm": dense(True, "Transformer Engine's layers only"),
    "hetereogenous_dist_checkpoint": dense(True, "a recursion sets it"),
    "high_priority_a2a_comm_stream": moe(True, "streams of a GPU"),
    "inference_rng_tracker": dense(True, "generation only"),
    "inference_sampling_seed": dense(3, "generation only"),
    "init_model_with_meta_device": dense(True, "Megatron-FSDP and Transformer Engine only"),
    "is_hybrid_model": dense(True, "GPTModel does not read it"),
    "kitchen_attention_backend": dense("fa", "use_kitchen is refused"),
    "masked_softmax_fusion": dense(True, "a kernel; the recursion uses PyTorch's attention"),
    "mlp_chunks_for_prefill": dense(2, "generation only"),
    "mlp_chunks_for_training": dense(3, "the same numbers in parts; refused with experts"),
    "moe_enable_routing_replay": moe(True, "nothing is replayed; each layer keeps its last step"),
    "moe_layer_recompute": moe(True, "the same numbers, computed again"),
    "moe_mlp_glu_interleave_size": moe(8, "fused experts only"),
    "moe_ncclep_static_shape": moe(True, "the flex dispatcher only"),
    "moe_pad_experts_for_cuda_graph_inference": moe(True, "generation only"),
    "moe_per_layer_logging": moe(True, "logs; steps are logged as unrolled layers"),
    "moe_router_dtype": moe("fp32", "the model is in fp32 already; 'fp64' is equal too"),
    "moe_router_quantile_balancing_ema": moe(0.5, "quantile balancing is refused"),
    "moe_router_topk_limited_devices": moe(1, "an older name; the groups are equal"),
    "moe_shared_expert_glu_interleave_size": moe(8, "fused experts only"),
    "moe_token_dispatcher_type": moe("allgather", "another way to the same experts"),
    "moe_token_dropping": moe(True, "nothing in Megatron-Core reads it"),
    "mtp_standalone": dense(True, "a flag of the pipeline layout"),
    "nccl_all_reduce_for_prefill": dense(True, "generation only"),
    "num_layers_at_end_in_bf16": dense(2, "with fp8 and first_last_layers_bf16 only"),
    "num_layers_at_start_in_bf16": dense(2, "with fp8 and first_last_layers_bf16 only"),
    "num_microbatches_with_partial_activation_checkpoints": dense(
        1, "the same numbers, some computed again", **FULL
    ),
    "offload_modules": dense(["core_attn"], "offloading is refused"),
    "perform_initialization": dense(False, "weights are set by the comparison"),
    "recompute_granularity": dense(
        "full", "the same numbers, computed again", recompute_method="block", recompute_num_layers=3
    ),
    "recompute_method": dense(
        "uniform", "the same", recompute_granularity="full", recompute_num_layers=4
    ),
    "recompute_modules": moe(
        ["core_attn", "moe"], "the same; 'layernorm' needs Transformer Engine",
        recompute_granularity="selective",
    ),
    "recompute_num_layers": dense(
        3, "the same", recompute_granularity="full", recompute_method="uniform"
    ),
    "test_mode": dense(True, "nothing that training reads"),
    "transformer_impl": dense("transformer_engine", "on a CPU the local layers are built"),
    "use_cpu_initialization": dense(True, "weights are set by the comparison"),
    "use_fused_weighted_squared_relu": dense(True, "with another activation"),
    "use_inference_optimized_layers": dense(True, "generation only"),
    "use_kitchen_attention": dense(True, "use_kitchen is refused"),
    "use_te_rng_tracker": dense(True, "Transformer Engine only"),
    "variable_seq_lengths": moe(True, "one stage sends nothing"),
    "window_attn_skip_freq": dense(2, "windows are refused"),
    "linear_attention_freq": dense(2, "experimental_attention_variant is refused"),
}  # fmt: skip

REFUSED: dict[str, Trial] = {
    "apply_query_key_layer_scaling": refused(
        True, "does not implement apply_query_key_layer_scaling=True"
    ),
    "attention_output_gate": refused(
        True, "gated attention is not implemented for selected tokens"
    ),
    "distribute_saved_activations": refused(True, "the empty ones return their input", **FULL),
    "experimental_attention_variant": refused(
        "dsa", "layers that default_layer_spec does not build"
    ),
    "external_cuda_graph": refused(True, "the number of selected tokens varies"),
    "fine_grained_activation_offloading": refused(
        True, "would overwrite what it offloaded", offload_modules=["core_attn"]
    ),
    "fp8_recipe": refused(
        "delayed", "overwrites the maxima from which its next scale is computed", fp8="hybrid"
    ),
    "heterogeneous_block_specs": refused(True, "layers that default_layer_spec does not build"),
    "hybrid_context_parallel": refused(True, "its groups change from sequence to sequence"),
    "layernorm_zero_centered_gamma": refused(True, "needs a norm from Transformer Engine or Apex"),
    "log_max_attention_logit": refused(True, "steps would overwrite one another's"),
    "memory_efficient_layer_norm": refused(True, "needs a norm from Transformer Engine or Apex"),
    "moe_grouped_gemm": refused_moe(True, "needs Transformer Engine and CUDA"),
    "moe_pad_expert_input_to_capacity": refused_moe(
        True, "steps and ranks run different numbers of tokens", moe_expert_capacity_factor=1.0
    ),
    "multi_latent_attention": refused(True, "it computes the positions of tokens itself"),
    "no_rope_freq": refused(2, "the steps of a shared layer are at several depths"),
    "qk_clip": refused(True, "steps would overwrite one another's"),
    "quant_recipe": refused(object(), "it selects layers by name and number"),
    "rotary_interleaved": refused(
        True, "selected tokens are rotated with the non-interleaved layout"
    ),
    "softmax_type": refused("learnable", "does not implement softmax_type=learnable"),
    "tp_comm_overlap": refused(True, "its buffers hold a fixed number of rows"),
    "use_grouped_gemm_for_dense_mlp": refused(
        True, "layers that default_layer_spec does not build"
    ),
    "use_kitchen": refused(True, "layers that default_layer_spec does not build"),
    "use_transformer_engine_op_fuser": refused(
        True, "layers that default_layer_spec does not build"
    ),
    "window_size": refused((3, 0), "does not implement window_size=(3, 0)"),
}

FURTHER: tuple[tuple[str, Trial], ...] = (
    ("activation_func", dense(squared_relu, gated_linear_unit=False)),
    ("moe_layer_freq", moe(2)),
    ("moe_layer_freq", refused_moe(3, "cannot be dense in one step and have experts in another")),
    ("moe_router_load_balancing_type", moe("seq_aux_loss", moe_aux_loss_coeff=0.1)),
    ("moe_router_load_balancing_type", moe("sinkhorn")),
    ("moe_router_load_balancing_type", refused_moe("global_aux_loss", "Use 'aux_loss'")),
    ("moe_router_load_balancing_type", refused_moe("quantile_balancing", "Use 'aux_loss'")),
    ("moe_router_score_function", moe("sqrtsoftplus")),
    ("moe_router_topk_scaling_factor", moe(2.5, moe_router_pre_softmax=True)),
    ("mtp_num_layers", moe(1)),
    ("num_query_groups", dense(None)),
    ("softmax_type", refused("off-by-one", "does not implement softmax_type=off-by-one")),
    ("calculate_per_token_loss", refused_moe(True, "by the tokens of a step")),
    ("mlp_chunks_for_training", refused_moe(2, "without the padding mask")),
)
"""Other values of fields above, which move plain layers or are refused too."""

_RANKS = "one rank; that {} compute what one computes: {}"
_LAYER = _RANKS.format("N ranks", "tests/distributed/layers/test_recursion_layer.py")
_CONTEXT = _RANKS.format("N ranks", "tests/distributed/layers/test_context_parallel.py")
_ENGINE = "needs Transformer Engine on a GPU"
_OVERLAP = "with tp_comm_overlap, which is refused"
_FLEX = "needs the flex dispatcher and its kernels on GPUs"
_PARAMETERS = "a parameter of a feature that is refused"
_SCHEDULE = "how stages exchange; one stage sends nothing"
_SHAPE = "every row has it"
_GENERATION = "generation with GPU kernels; a recursion generates with the static context"
_SHARDS = "sharded weights of several GPUs"
_HYBRID = "Mamba layers are in no GPTModel; see mor_megatron.models.hybrid"
_TRAINING = "tests/distributed/training"

NOT_RUN: dict[str, str] = {
    "tensor_model_parallel_size": _LAYER,
    "pipeline_model_parallel_size": _LAYER,
    "sequence_parallel": _LAYER,
    "expert_model_parallel_size": _LAYER,
    "expert_tensor_parallel_size": _LAYER,
    "context_parallel_size": _CONTEXT,
    "virtual_pipeline_model_parallel_size": "tests/distributed/pipeline/test_pipeline.py",
    "microbatch_group_size_per_vp_stage": "tests/distributed/pipeline/test_pipeline.py",
    "tensor_parallel_num_weight_shards": _SHARDS,
    "gtp_weight_remat_size": _SHARDS,
    "expert_tensor_parallel_num_weight_shards": _SHARDS,
    "expert_gtp_weight_remat_size": _SHARDS,
    "pipeline_model_parallel_comm_backend": _SCHEDULE,
    "pipeline_dtype": _SCHEDULE,
    "overlap_p2p_comm": _SCHEDULE,
    "batch_p2p_comm": _SCHEDULE + "; with virtual stages True is refused",
    "batch_p2p_sync": _SCHEDULE,
    "use_ring_exchange_p2p": _SCHEDULE,
    "overlap_p2p_comm_warmup_flush": _SCHEDULE,
    "hierarchical_context_parallel_sizes": "context parallelism of Transformer Engine",
    "max_seqlen_per_dp_cp_rank": "with hybrid_context_parallel, which is refused",
    "timers": "an object of the training script",
    "finalize_model_grads_func": f"the training loop sets it: {_TRAINING}/test_router_updates.py",
    "no_sync_func": f"the training loop sets it: {_TRAINING}/test_recursion_training.py",
    "grad_sync_func": "overlap over several ranks; no_sync_func is tested",
    "param_sync_func": "overlap over several ranks",
    "enable_autocast": "plain layers do not run under it without Transformer Engine",
    "autocast_dtype": "with enable_autocast",
    "gradient_accumulation_fusion": "needs a kernel of apex or Transformer Engine",
    "tp_comm_bulk_wgrad": _OVERLAP,
    "tp_comm_bulk_dgrad": _OVERLAP,
    "tp_comm_overlap_ag": _OVERLAP,
    "tp_comm_overlap_rs": _OVERLAP,
    "tp_comm_overlap_rs_dgrad": _OVERLAP,
    "tp_comm_split_ag": _OVERLAP,
    "tp_comm_atomic_ag": _OVERLAP,
    "tp_comm_split_rs": _OVERLAP,
    "tp_comm_atomic_rs": _OVERLAP,
    "tp_comm_overlap_disable_qkv": _OVERLAP,
    "tp_comm_overlap_disable_fc1": _OVERLAP,
    "tp_comm_bootstrap_backend": _OVERLAP,
    "cross_entropy_fusion_impl": "'te' needs a GPU; 'native' is what cross_entropy_loss_fusion ran",
    "overlap_moe_expert_parallel_comm": "refused; Megatron takes it with expert parallelism only",
    "delay_wgrad_compute": "with overlap_moe_expert_parallel_comm, which is refused",
    "overlap_dispatch_backward_with_experts_wgrad": _ENGINE,
    "ep_overlap_early_attn_memory_release": "with overlap_moe_expert_parallel_comm",
    "defer_embedding_wgrad_compute": "needs pipeline stages and gradient_accumulation_fusion",
    "wgrad_deferral_limit": "with defer_embedding_wgrad_compute",
    "cpu_offloading": "Megatron refuses it without Transformer Engine; with it a recursion does",
    "cpu_offloading_num_layers": _PARAMETERS,
    "_cpu_offloading_context": _PARAMETERS,
    "cpu_offloading_activations": _PARAMETERS,
    "cpu_offloading_weights": _PARAMETERS,
    "cpu_offloading_double_buffering": _PARAMETERS,
    "cpu_offloading_retain_pinned_cpu_buffers": _PARAMETERS,
    "num_layers": _SHAPE,
    "mtp_hybrid_override_pattern": _HYBRID,
    "num_layers_in_first_pipeline_stage": "a stage that cuts a recursion is refused by name",
    "num_layers_in_last_pipeline_stage": "a stage that cuts a recursion is refused by name",
    "pipeline_model_parallel_layout": f"{_TRAINING}/test_recursion_training.py",
    "account_for_embedding_in_pipeline_split": "a stage that cuts a recursion is refused by name",
    "account_for_loss_in_pipeline_split": "a stage that cuts a recursion is refused by name",
    "flash_attention_version": "kernels of a GPU",
    "qk_clip_alpha": _PARAMETERS,
    "qk_clip_threshold": _PARAMETERS,
    "experimental_attention_variant_loss_scale_func": "a recursion calls what is there, then its own: "
    f"{_TRAINING}/test_recursion_training.py",
    "dsa_indexer_n_heads": _PARAMETERS,
    "dsa_indexer_head_dim": _PARAMETERS,
    "dsa_indexer_topk": _PARAMETERS,
    "dsa_indexer_topk_freq": _PARAMETERS,
    "dsa_indexer_skip_topk_offset": _PARAMETERS,
    "dsa_indexer_loss_coeff": _PARAMETERS,
    "dsa_indexer_use_sparse_loss": _PARAMETERS,
    "dsa_kernel_backend": _PARAMETERS,
    "dsa_indexer_rope_interleaved": _PARAMETERS,
    "dsa_indexer_rotate_activation": _PARAMETERS,
    "dsa_indexer_scoring_relu": _PARAMETERS,
    "dsa_indexer_k_norm_epsilon": _PARAMETERS,
    "dsa_indexer_k_norm_fp32": _PARAMETERS,
    "linear_conv_kernel_dim": _PARAMETERS,
    "linear_key_head_dim": _PARAMETERS,
    "linear_value_head_dim": _PARAMETERS,
    "linear_num_key_heads": _PARAMETERS,
    "linear_num_value_heads": _PARAMETERS,
    "mup_width_mult": "Megatron computes it from mup_base_hidden_size",
    "persist_layer_norm": "Megatron's norms refuse it without apex; the recursion's has one kernel",
    "apply_rope_fusion": _ENGINE + "; with stand-ins: tests/distributed/platform",
    "fused_single_qkv_rope": _ENGINE,
    "fp8": "needs a GPU; with stand-ins: tests/distributed/platform/test_quantization.py",
    "fp8_param": "needs a GPU",
    "fp8_quantizer_factory": "needs a GPU",
    "fp8_margin": "needs a GPU",
    "fp8_interval": "needs a GPU",
    "fp8_amax_history_len": "of the delayed recipe, which is refused",
    "fp8_amax_compute_algo": "of the delayed recipe, which is refused",
    "fp8_wgrad": "needs a GPU",
    "fp8_output_proj": "needs a GPU",
    "fp8_dot_product_attention": "needs a GPU",
    "fp8_multi_head_attention": "needs a GPU",
    "tp_only_amax_red": "needs several GPUs",
    "first_last_layers_bf16": "with fp8; a shared layer with two precisions is refused: "
    "tests/distributed/platform/test_quantization.py",
    "fp4": "needs a GPU",
    "fp4_recipe": "needs a GPU",
    "fp4_param": "needs a GPU",
    "fp4_quantizer_factory": "needs a GPU",
    "use_grouped_gemm_for_shared_expert": _ENGINE,
    "moe_router_padding_for_quantization": "with fp8",
    "moe_router_padding_for_fp8": "with fp8",
    "moe_single_grouped_weight": "with moe_grouped_gemm",
    "moe_single_grouped_bias": "with moe_grouped_gemm",
    "moe_enable_deepep": _FLEX,
    "moe_flex_dispatcher_backend": _FLEX,
    "moe_permute_fusion_into_hybridep": _FLEX,
    "moe_hybridep_pad_uneven_dispatch_inputs": _FLEX,
    "moe_token_drop_policy": "'position': a recursion turns the last tokens away, as it is documented; "
    "Megatron takes the top k of ones and zeros, whose ties fall as the kernel likes",
    "moe_permute_fusion": _ENGINE,
    "moe_router_fusion": _ENGINE,
    "moe_latent_size": _ENGINE,
    "moe_flex_dispatcher_num_sms": _FLEX,
    "moe_deepep_num_sms": _FLEX,
    "moe_hybridep_num_sms": _FLEX,
    "moe_hybridep_num_blocks_permute": _FLEX,
    "moe_hybridep_num_blocks_unpermute": _FLEX,
    "moe_hybridep_num_sms_preprocessing": _FLEX,
    "moe_ncclep_zero_copy": _FLEX,
    "moe_expert_rank_capacity_factor": _FLEX,
    "enable_cuda_graph": "a CPU's random numbers have no graphs; set, it becomes cuda_graph_impl",
    "cuda_graph_impl": "a CPU's random numbers have no graphs; on a GPU it is refused",
    "inference_cuda_graph_scope": "with cuda_graph_impl",
    "config_logger_dir": "writes a file",
    "batch_invariant_mode": "kernels of a GPU",
    "use_te_activation_func": _ENGINE,
    "symmetric_ar_type": _ENGINE,
    "inference_fuse_tp_communication": _GENERATION,
    "inference_disable_triton_nvls_kernels": _GENERATION,
    "inference_grouped_gemm_backend": _GENERATION,
    "inference_moe_disable_fused_quant_kernels": _GENERATION,
    "inference_moe_token_dispatcher_type": _GENERATION,
    "mamba_state_dim": _HYBRID,
    "mamba_head_dim": _HYBRID,
    "mamba_num_groups": _HYBRID,
    "mamba_num_heads": _HYBRID,
    "mamba_training_ssm_states_dtype": _HYBRID,
    "use_mamba_mem_eff_path": _HYBRID,
    "min_offloaded_tensor_size": _PARAMETERS,
    "delay_offload_until_cuda_graph": _PARAMETERS,
    "delta_offload_bytes_across_pp_ranks": _PARAMETERS,
    "activation_offload_fraction": _PARAMETERS,
    "fine_grained_offloading_max_inflight_offloads": _PARAMETERS,
    "moe_paged_stash": _FLEX,
    "moe_paged_stash_page_size": _FLEX,
    "moe_paged_stash_buffer_size_factor_cuda": _FLEX,
    "moe_paged_stash_buffer_size_factor_cpu": _FLEX,
}
