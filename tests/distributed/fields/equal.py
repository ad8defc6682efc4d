"""Values that change what plain layers compute, or how, and what a recursion computes too."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.distributed import finalize_model_grads

from tests.distributed.fields.trial import (
    CONSTANT,
    MLA,
    MTP,
    MUP,
    ROUNDING,
    SHARED,
    SIGMOID,
    Trial,
    constant,
    dense,
    moe,
    spread,
    spread_moe,
)

TP2, PP2 = {"tp": 2}, {"pp": 2}
LAYOUT = "Et|t*6,tL"
PP = {"pipeline_model_parallel_size": 2}
LATENT = {name: value for name, value in MLA.items() if name != "multi_latent_attention"}
TWO_STAGES = {**PP, "pipeline_model_parallel_layout": LAYOUT}
SP = {"sequence_parallel": True}


def twice(model: Any, *args: Any, **kwargs: Any) -> None:
    """Megatron's function, of twice the gradients."""
    finalize_model_grads(model, *args, **kwargs)
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.main_grad *= 2


EQUAL: dict[str, Trial] = {
    "activation_func": dense(F.gelu),
    "activation_func_clamp_value": dense(0.1, activation_func=quick_gelu),
    "add_bias_linear": dense(True),
    "add_qkv_bias": dense(True),
    "attention_output_gate": dense(True),
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
        "also 'global_aux_loss', 'sinkhorn' and 'none'; 'quantile_balancing' is refused",
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
        "in every layout; folders of weights leave its heads out",
    ),
    "mtp_use_repeated_layer": dense(True, **MTP),
    "multi_latent_attention": dense(True, "with rope_type 'rope' and 'yarn'", **LATENT),
    "mup_attn_scale_power": dense(0.5, **MUP),
    "mup_base_head_dim": dense(4, mup_attn_scale_power=0.5, **MUP),
    "mup_base_hidden_size": dense(8, use_mup=True),
    "mup_embedding_mult": dense(2.0, **MUP),
    "mup_output_mult": dense(0.5, **MUP),
    "no_rope_freq": dense(2, "alike in all steps; refused otherwise"),
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
    "rotary_interleaved": dense(True),
    "softmax_scale": dense(0.5),
    "softmax_type": dense("learnable"),
    "window_attn_skip_freq": dense(2, "alike in all steps; refused otherwise", window_size=(3, 0)),
    "window_size": dense((3, 0), "in positions of the sequence"),
    "use_mup": dense(True, mup_base_hidden_size=16),
    "batch_p2p_comm": spread(True, PP2, "with virtual stages True is refused", **TWO_STAGES),
    "batch_p2p_sync": spread(False, PP2, batch_p2p_comm=True, **TWO_STAGES),
    "deallocate_pipeline_outputs": spread(True, PP2, **TWO_STAGES),
    "expert_model_parallel_size": spread_moe(2, {"ep": 2}),
    "expert_tensor_parallel_size": spread_moe(1, TP2, tensor_model_parallel_size=2, **SP),
    "finalize_model_grads_func": dense(
        twice, "a recursion updates its routers after the function that is there"
    ),
    "num_layers": dense(11, "one more layer in each of three steps"),
    "num_layers_in_first_pipeline_stage": spread(1, PP2, "a whole part; refused otherwise", **PP),
    "num_layers_in_last_pipeline_stage": spread(1, PP2, "a whole part; refused otherwise", **PP),
    "pipeline_dtype": Trial(
        torch.bfloat16,
        {"bf16": True, "params_dtype": torch.bfloat16, **TWO_STAGES},
        layout=PP2,
        **ROUNDING,
    ),
    "pipeline_model_parallel_layout": spread(LAYOUT, PP2, "whole parts; refused otherwise", **PP),
    "pipeline_model_parallel_size": spread(2, PP2, pipeline_model_parallel_layout=LAYOUT),
    "sequence_parallel": spread(
        True,
        TP2,
        "plain layers with the recursion's norm: Megatron's local one refuses it",
        tensor_model_parallel_size=2,
    ),
    "tensor_model_parallel_size": spread(2, TP2),
}

EQUAL_TO_ONE_RANK: dict[str, str] = {
    "context_parallel_size": "tests/distributed/layers/test_context_parallel.py",
    "virtual_pipeline_model_parallel_size": "tests/distributed/pipeline/test_pipeline.py",
    "overlap_p2p_comm": "tests/distributed/pipeline/test_pipeline.py",  # with virtual stages only
}
"""Compared with a recursion on one rank, because plain local layers refuse it or have no such stages."""
