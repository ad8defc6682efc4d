"""What each field of TransformerConfig does to a recursion: data.

A field is in exactly one table. `EQUAL` and `WITHOUT_EFFECT` hold values to try: under each, a recursion
of fixed depth computes what Megatron's own unrolled layers compute, see `comparison`. `REFUSED` holds
values that a recursion does not take, and `REJECTED` those that Megatron does not take on a CPU.
`EQUAL_TO_ONE_RANK` names the tests of what plain layers cannot be spread by, and `DIFFERENT` says where
a recursion deliberately does something else.
"""

from megatron.core.activations import squared_relu

from tests.distributed.fields.equal import EQUAL, EQUAL_TO_ONE_RANK, PP, PP2
from tests.distributed.fields.refused import REFUSED
from tests.distributed.fields.rejected import REJECTED
from tests.distributed.fields.trial import MLA, Trial, dense, moe, refused, refused_moe, spread
from tests.distributed.fields.without_effect import WITHOUT_EFFECT

__all__ = [
    "DIFFERENT",
    "EQUAL",
    "EQUAL_TO_ONE_RANK",
    "FURTHER",
    "REFUSED",
    "REJECTED",
    "WITHOUT_EFFECT",
]

DIFFERENT: dict[str, str] = {
    "moe_token_drop_policy": "'position': a full expert turns the last tokens away, as Megatron's "
    "documentation says. Megatron takes the top k of ones and zeros, so that the kernel decides "
    "between equals. N ranks compute what one computes: "
    "tests/distributed/layers/test_depth_by_expert.py",
}

FURTHER: tuple[tuple[str, Trial], ...] = (
    ("activation_func", dense(squared_relu, gated_linear_unit=False)),
    ("moe_layer_freq", moe(2)),
    ("moe_layer_freq", refused_moe(3, "cannot be dense in one step and have experts in another")),
    ("moe_router_load_balancing_type", moe("seq_aux_loss", moe_aux_loss_coeff=0.1)),
    ("moe_router_load_balancing_type", moe("sinkhorn")),
    ("moe_router_load_balancing_type", moe("global_aux_loss", moe_aux_loss_coeff=0.1)),
    ("moe_router_load_balancing_type", refused_moe("quantile_balancing", "Use 'aux_loss'")),
    ("moe_router_score_function", moe("sqrtsoftplus")),
    ("moe_router_topk_scaling_factor", moe(2.5, moe_router_pre_softmax=True)),
    ("mtp_num_layers", moe(1)),
    ("mtp_num_layers", spread(1, PP2, **PP, pipeline_model_parallel_layout="Et|t*6,tmL")),
    ("multi_latent_attention", moe(True, **MLA | {"rope_type": "yarn", "mtp_num_layers": 1})),
    ("multi_latent_attention", dense(True, **MLA | {"q_lora_rank": None, "qk_layernorm": False})),
    ("num_query_groups", dense(None)),
    ("no_rope_freq", refused(4, "which has one attention")),
    ("softmax_type", dense("off-by-one")),
    ("window_attn_skip_freq", refused(3, "which has one attention", window_size=(3, 0))),
    ("window_size", refused((3, 1), "has room for later tokens")),
    ("calculate_per_token_loss", moe(True, moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.1)),
    ("mlp_chunks_for_training", refused_moe(2, "without the padding mask")),
)
"""Other values of fields above, which move plain layers or are refused too."""
