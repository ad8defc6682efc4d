"""Values that a recursion does not take, with a part of what it says."""

from tests.distributed.fields.trial import FULL, Trial, refused, refused_later, refused_moe

REFUSED: dict[str, Trial] = {
    "distribute_saved_activations": refused(True, "the empty ones return their input", **FULL),
    "experimental_attention_variant": refused(
        "dsa", "layers that default_layer_spec does not build"
    ),
    "external_cuda_graph": refused(True, "captures the parts of plain layers"),
    "fine_grained_activation_offloading": refused(
        True, "less would be offloaded than asked for", offload_modules=["core_attn"]
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
    "qk_clip": refused(True, "steps would overwrite one another's"),
    "quant_recipe": refused(object(), "it selects layers by name and number"),
    "tp_comm_overlap": refused(True, "its buffers hold a fixed number of rows"),
    "use_grouped_gemm_for_dense_mlp": refused(
        True, "layers that default_layer_spec does not build"
    ),
    "use_kitchen": refused(True, "layers that default_layer_spec does not build"),
    "use_transformer_engine_op_fuser": refused(
        True, "layers that default_layer_spec does not build"
    ),
    "cpu_offloading": refused_later(True, "a whole recursion is one entry"),
    "cuda_graph_impl": refused_later("local", "each expert gets a number of tokens"),
    "delay_wgrad_compute": refused_later(True, "computes the delayed gradients"),
    "fused_single_qkv_rope": refused_later(True, "takes the row number as the position"),
    "moe_paged_stash": refused_later(
        True, "layers that run several times. Use recompute_granularity instead"
    ),
    "overlap_dispatch_backward_with_experts_wgrad": refused_later(
        True, "queue the gradients of their weights"
    ),
    "overlap_moe_expert_parallel_comm": refused_later(True, "splits plain layers into parts"),
}
