"""Values that do not change what plain layers compute on a CPU, nor what a recursion does."""

from contextlib import nullcontext
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from megatron.core.timers import Timers
from megatron.core.transformer.enums import AttnBackend

from tests.distributed.fields.trial import FULL, Trial, dense, moe

OVERLAP = "with tp_comm_overlap, which is refused"
VARIANT = "with experimental_attention_variant, which is refused"
MAMBA = "Mamba layers are in no GPTModel; see mor_megatron.models.hybrid"
FLEX = "the flex dispatcher and its kernels on GPUs only, where none has run with a recursion"
FP8 = "with fp8"
SHARDS = "weights sharded over GPUs by Transformer Engine; nothing reads it without"


def nothing(*args: Any) -> None:
    """A function that a schedule calls."""


WITHOUT_EFFECT: dict[str, Trial] = {
    "activation_func_fp8_input_store": dense(True, "only kernels of Transformer Engine read it"),
    "apply_residual_connection_post_layernorm": dense(True, "nothing in Megatron-Core reads it"),
    "attention_backend": dense(AttnBackend.unfused, "it chooses between Transformer Engine's"),
    "attention_softmax_in_fp32": dense(False, "the model is in fp32 already"),
    "barrier_with_L1_time": dense(False, "timers only"),
    "bias_dropout_fusion": dense(True, "the same arithmetic, compiled"),
    "calculate_per_token_loss": dense(True, "sequences are of one length, so the mean is the same"),
    "clone_scatter_output_in_embedding": dense(False, "memory only, under sequence parallelism"),
    "cp_comm_type": dense("a2a", "a recursion gathers keys itself"),
    "cuda_graph_modules": dense(["attn"], "there is no graph"),
    "cuda_graph_retain_backward_graph": dense(True, "there is no graph"),
    "cuda_graph_scope": dense("attn", "there is no graph"),
    "cuda_graph_use_single_mempool": dense(False, "there is no graph"),
    "cuda_graph_warmup_steps": dense(5, "there is no graph"),
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
        ["core_attn", "moe"],
        "the same; 'layernorm' needs Transformer Engine",
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
    "apply_query_key_layer_scaling": dense(
        True, "a factor that keeps scores small in fp16 and is taken back before the softmax"
    ),
    "linear_attention_freq": dense(2, "experimental_attention_variant is refused"),
    "tp_comm_bulk_wgrad": dense(False, OVERLAP),
    "tp_comm_bulk_dgrad": dense(False, OVERLAP),
    "tp_comm_overlap_ag": dense(False, OVERLAP),
    "tp_comm_overlap_rs": dense(False, OVERLAP),
    "tp_comm_split_ag": dense(False, OVERLAP),
    "tp_comm_split_rs": dense(False, OVERLAP),
    "tp_comm_overlap_rs_dgrad": dense(True, OVERLAP),
    "tp_comm_atomic_ag": dense(True, OVERLAP),
    "tp_comm_atomic_rs": dense(True, OVERLAP),
    "tp_comm_overlap_disable_qkv": dense(True, OVERLAP),
    "tp_comm_overlap_disable_fc1": dense(True, OVERLAP),
    "tp_comm_bootstrap_backend": dense("mpi", OVERLAP),
    "dsa_indexer_n_heads": dense(2, VARIANT),
    "dsa_indexer_head_dim": dense(8, VARIANT),
    "dsa_indexer_topk": dense(4, VARIANT),
    "dsa_indexer_topk_freq": dense(2, VARIANT),
    "dsa_indexer_skip_topk_offset": dense(1, VARIANT),
    "dsa_indexer_loss_coeff": dense(0.1, VARIANT),
    "dsa_indexer_use_sparse_loss": dense(True, VARIANT),
    "dsa_kernel_backend": dense("tilelang", VARIANT),
    "dsa_indexer_rope_interleaved": dense(True, VARIANT),
    "dsa_indexer_rotate_activation": dense(False, VARIANT),
    "dsa_indexer_scoring_relu": dense(False, VARIANT),
    "dsa_indexer_k_norm_epsilon": dense(1e-3, VARIANT),
    "dsa_indexer_k_norm_fp32": dense(True, VARIANT),
    "linear_conv_kernel_dim": dense(2, VARIANT),
    "linear_key_head_dim": dense(8, VARIANT),
    "linear_value_head_dim": dense(8, VARIANT),
    "linear_num_key_heads": dense(2, VARIANT),
    "linear_num_value_heads": dense(2, VARIANT),
    "mamba_state_dim": dense(64, MAMBA),
    "mamba_head_dim": dense(32, MAMBA),
    "mamba_num_groups": dense(4, MAMBA),
    "mamba_num_heads": dense(4, MAMBA),
    "mamba_training_ssm_states_dtype": dense(torch.bfloat16, MAMBA),
    "use_mamba_mem_eff_path": dense(False, MAMBA),
    "mtp_hybrid_override_pattern": dense("*-", "HybridModel only"),
    "cpu_offloading_num_layers": dense(2, "with cpu_offloading, which is refused"),
    "cpu_offloading_activations": dense(False, "with cpu_offloading, which is refused"),
    "cpu_offloading_weights": dense(True, "with cpu_offloading, which is refused"),
    "cpu_offloading_double_buffering": dense(True, "with cpu_offloading, which is refused"),
    "cpu_offloading_retain_pinned_cpu_buffers": dense(
        True, "with cpu_offloading, which is refused"
    ),
    "_cpu_offloading_context": dense(nullcontext(), "with cpu_offloading, which is refused"),
    "min_offloaded_tensor_size": dense(
        10, "with fine_grained_activation_offloading, which is refused"
    ),
    "delay_offload_until_cuda_graph": dense(
        True, "with fine_grained_activation_offloading, which is refused"
    ),
    "delta_offload_bytes_across_pp_ranks": dense(
        5, "with fine_grained_activation_offloading, which is refused"
    ),
    "activation_offload_fraction": dense(
        0.5, "with fine_grained_activation_offloading, which is refused"
    ),
    "fine_grained_offloading_max_inflight_offloads": dense(
        2, "with fine_grained_activation_offloading, which is refused"
    ),
    "moe_flex_dispatcher_backend": moe("hybridep", FLEX),
    "moe_permute_fusion_into_hybridep": moe(True, FLEX),
    "moe_hybridep_pad_uneven_dispatch_inputs": moe(True, FLEX),
    "moe_flex_dispatcher_num_sms": moe(8, FLEX),
    "moe_deepep_num_sms": moe(8, FLEX),
    "moe_hybridep_num_sms": moe(8, FLEX),
    "moe_hybridep_num_blocks_permute": moe(8, FLEX),
    "moe_hybridep_num_blocks_unpermute": moe(8, FLEX),
    "moe_hybridep_num_sms_preprocessing": moe(8, FLEX),
    "moe_ncclep_zero_copy": moe(True, FLEX),
    "moe_paged_stash_page_size": moe(32, "with moe_paged_stash, which is refused"),
    "moe_paged_stash_buffer_size_factor_cuda": moe(1.5, "with moe_paged_stash, which is refused"),
    "moe_paged_stash_buffer_size_factor_cpu": moe(0.5, "with moe_paged_stash, which is refused"),
    "inference_grouped_gemm_backend": moe(
        "torch", "generation with the inference_optimized layers, which are refused"
    ),
    "inference_moe_disable_fused_quant_kernels": moe(
        True, "generation with the inference_optimized layers, which are refused"
    ),
    "inference_moe_token_dispatcher_type": moe(
        "nccl", "generation with the inference_optimized layers, which are refused"
    ),
    "fp8": dense(
        "hybrid",
        "GPU case: engine/fp8/tensorwise; with stand-ins: tests/distributed/platform",
        fp8_recipe="tensorwise",
    ),
    "fp8_quantizer_factory": dense("module.factory", FP8),
    "fp8_margin": dense(1, FP8),
    "fp8_interval": dense(2, FP8),
    "fp8_amax_history_len": dense(4, "only for the delayed recipe, which is refused"),
    "fp8_amax_compute_algo": dense("max", "only for the delayed recipe, which is refused"),
    "fp8_wgrad": dense(False, FP8),
    "fp8_dot_product_attention": dense(True, FP8),
    "fp8_multi_head_attention": dense(True, FP8),
    "tp_only_amax_red": dense(True, "only for the delayed recipe, which is refused"),
    "first_last_layers_bf16": dense(
        True, "with fp8 or fp4; a shared layer with two precisions is refused"
    ),
    "fp4": dense("e2m1", "kernels of a GPU, on which a recursion in FP4 has not run"),
    "fp4_recipe": dense("custom", "with fp4"),
    "fp4_quantizer_factory": dense("module.factory", "with fp4"),
    "gtp_weight_remat_size": dense(2, SHARDS),
    "tensor_parallel_num_weight_shards": dense(2, SHARDS),
    "expert_gtp_weight_remat_size": moe(2, SHARDS),
    "expert_tensor_parallel_num_weight_shards": moe(2, SHARDS),
    "pipeline_model_parallel_comm_backend": dense("ucc", "read when process groups are created"),
    "use_ring_exchange_p2p": dense(True, "one stage sends nothing; PyTorch has no such exchange"),
    "overlap_p2p_comm_warmup_flush": dense(True, "virtual stages only", overlap_p2p_comm=True),
    "hierarchical_context_parallel_sizes": dense(
        [1, 1], "context parallelism of Transformer Engine, which a recursion replaces"
    ),
    "max_seqlen_per_dp_cp_rank": dense(64, "with hybrid_context_parallel, which is refused"),
    "timers": dense(Timers(2, "minmax"), "timers only measure"),
    "microbatch_group_size_per_vp_stage": dense(2, "virtual stages only"),
    "no_sync_func": dense(
        nullcontext, "one replica has nothing to reduce; with more: tests/distributed/training"
    ),
    "grad_sync_func": dense(nothing, "virtual stages only"),
    "param_sync_func": dense(nothing, "virtual stages only"),
    "experimental_attention_variant_loss_scale_func": dense(
        nothing,
        "a function that does nothing; a recursion calls it and then sets its own scale",
    ),
    "autocast_dtype": dense(torch.bfloat16, "with enable_autocast"),
    "wgrad_deferral_limit": dense(2, "with defer_embedding_wgrad_compute"),
    "account_for_embedding_in_pipeline_split": dense(
        True, "one stage; a stage that cuts a recursion is refused"
    ),
    "account_for_loss_in_pipeline_split": dense(
        True, "one stage; a stage that cuts a recursion is refused"
    ),
    "flash_attention_version": dense(3, "kernels of a GPU"),
    "qk_clip_alpha": dense(0.7, "with qk_clip, which is refused"),
    "qk_clip_threshold": dense(50.0, "with qk_clip, which is refused"),
    "mup_width_mult": dense(3.0, "Megatron computes it from mup_base_hidden_size"),
    "config_logger_dir": dense(str(Path(gettempdir(), "megatron_configs")), "it writes files"),
}
