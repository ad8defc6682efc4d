"""Values that Megatron itself refuses on a CPU, with a part of what it says.

Notes say what becomes of them where Megatron takes them.
"""

import torch

from tests.distributed.fields.trial import Trial, rejected, rejected_moe

GPU = "not run on a GPU, and there is no case for it"

REJECTED: dict[str, Trial] = {
    "apply_rope_fusion": rejected(
        True,
        "Please install TE",
        "GPU case: engine/rotary; with stand-ins: tests/distributed/platform",
    ),
    "batch_invariant_mode": rejected(True, "only supports FlashAttention", GPU),
    "cross_entropy_fusion_impl": rejected(
        "te",
        "Trying to use a TE block when it's not present",
        "the head's loss, outside of a recursion",
        cross_entropy_loss_fusion=True,
    ),
    "defer_embedding_wgrad_compute": rejected(
        True,
        "Cannot defer embedding wgrad compute when pipeline model parallel is not used",
        "the head's gradient, outside of a recursion",
    ),
    "enable_autocast": rejected(
        True,
        "to have the same dtype",
        "Megatron's local layers do not run under it",
        autocast_dtype=torch.bfloat16,
    ),
    "enable_cuda_graph": rejected(
        True,
        "does not support cudagraphs",
        "elsewhere it becomes cuda_graph_impl",
    ),
    "ep_overlap_early_attn_memory_release": rejected_moe(
        True, "overlap_moe_expert_parallel_comm must be enabled", "that option is refused"
    ),
    "fp4_param": rejected(True, "must be used together with fp4 mode", GPU),
    "fp8_output_proj": rejected(
        True, "must be used together with fp8 mode", "the head, outside of a recursion"
    ),
    "fp8_param": rejected(True, "must be used together with fp8 mode", GPU),
    "gradient_accumulation_fusion": rejected(
        True,
        "fused_weight_gradient_mlp_cuda module is not found",
        "GPU case: engine/fused gradients",
    ),
    "inference_cuda_graph_scope": rejected(
        "block", "Invalid inference CUDA graph scope", "with cuda_graph_impl"
    ),
    "inference_disable_triton_nvls_kernels": rejected(
        True, "only supported for inference_optimized", "those layers are refused"
    ),
    "inference_fuse_tp_communication": rejected(
        True, "only supported for inference_optimized", "those layers are refused"
    ),
    "moe_enable_deepep": rejected_moe(True, "only supported with flex token dispatcher", GPU),
    "moe_expert_rank_capacity_factor": rejected_moe(
        1.0, "requires moe_flex_dispatcher_backend", GPU
    ),
    "moe_latent_size": rejected_moe(16, "TransformerEngine is required", GPU),
    "moe_permute_fusion": rejected_moe(True, "Please install TE", GPU),
    "moe_router_fusion": rejected_moe(True, "Please install TE", GPU),
    "moe_router_padding_for_fp8": rejected_moe(True, "fp8/fp4 must be specified", GPU),
    "moe_router_padding_for_quantization": rejected_moe(True, "fp8/fp4 must be specified", GPU),
    "moe_single_grouped_bias": rejected_moe(True, "require moe_grouped_gemm=True", GPU),
    "moe_single_grouped_weight": rejected_moe(True, "require moe_grouped_gemm=True", GPU),
    "persist_layer_norm": rejected(
        True, "not supported by torch LayerNorm", "the recursion's norm has one kernel"
    ),
    "symmetric_ar_type": rejected("two_shot", "Must have at least TE version 2.3", GPU),
    "use_grouped_gemm_for_shared_expert": rejected_moe(
        True, "requires Transformer Engine", GPU, moe_shared_expert_intermediate_size=32
    ),
    "use_te_activation_func": rejected(
        True,
        "shapes cannot be multiplied",
        f"Megatron's local layers accept it and do not implement it;  {GPU}",
    ),
}
