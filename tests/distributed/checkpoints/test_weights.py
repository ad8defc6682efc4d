"""Weights go from a MoRTransformer into GPTModel at any layout and back, experts included."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from mor_layers import (
    DecoderConfig,
    DepthAndWidth,
    ExpertChoice,
    MoEConfig,
    MoRTransformer,
    RecursionConfig,
    Relaxation,
)
from mor_layers.layers import NormModulation
from mor_layers.models import (
    LatentAttentionConfig,
    LinearScaling,
    Llama3Scaling,
    MultiTokenPrediction,
    YarnScaling,
)
from mor_layers.recursion import HistoryInjection, HyperConnections
from mor_megatron import (
    Norm,
    causal_routing,
    default_layer_spec,
    mtp_block_spec,
    recursion_block_spec,
)
from mor_megatron.checkpoints import decoder_tensors, load_tensors, whole_tensors
from mor_megatron.checkpoints.weights import megatron_names, megatron_tensors
from mor_megatron.parallel import rotary_settings
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

EXPERTS = MoEConfig(4, 2, ffn_hidden_size=24)
DEEPSEEK = MoEConfig(
    8, 4, 24, bias_update_rate=0.01, scores="sigmoid", gate_scale=2.5, num_groups=4,
    groups_per_token=2, shared_ffn_hidden_size=20,
)  # fmt: skip
WISE = RecursionConfig(3, router=ExpertChoice())
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"recursion": WISE},
    "per-step norms": {"recursion": RecursionConfig(3, share_norms=False)},
    "one by one": {"recursion": RecursionConfig(3, sharing="middle_sequence")},
    "experts": {"recursion": WISE, "moe": EXPERTS},
    "dense ends": {"recursion": WISE, "moe": EXPERTS, "dense_ends": True},
    "an expert router a step": {
        "recursion": RecursionConfig(3, router=ExpertChoice(), expert_routers="per_step"),
        "moe": EXPERTS,
    },
    "depth and width": {
        "recursion": RecursionConfig(3, router=DepthAndWidth(mean_experts=1.5)),
        "moe": EXPERTS,
    },
    "Qwen's": {"recursion": WISE, "head_dim": 12, "qkv_bias": True, "qk_norm": True},
    "deltas": {"recursion": replace(WISE, relaxation=Relaxation(3, "dora", scale=0.5))},
    "deltas beside experts": {
        "recursion": replace(WISE, relaxation=Relaxation(40, projections=("query", "output"))),
        "moe": EXPERTS,
    },
    "all helps": {
        "recursion": replace(
            WISE,
            share_norms=False,
            step_embeddings=True,
            input_injection=True,
            sandwich_norms=True,
            loop_norm=True,
            residual_scale=2.0,
            router=ExpertChoice(gate_bias=0.5),
        )
    },
    "own attention": {
        "recursion": replace(
            WISE, own_per_step=("attention",), share_norms=False, expert_routers="per_step"
        ),
        "moe": EXPERTS,
        "qkv_bias": True,
        "qk_norm": True,
    },
    "own MLPs": {
        "recursion": replace(
            WISE, own_per_step=("mlp",), relaxation=Relaxation(2, projections=("query", "output"))
        )
    },
    "streams": {"recursion": replace(WISE, hyper_connections=HyperConnections(2))},
    "static streams beside experts": {
        "recursion": replace(WISE, hyper_connections=HyperConnections(3, "static")),
        "moe": EXPERTS,
    },
    "history, modulated norms": {
        "recursion": replace(
            WISE, norm_modulation=NormModulation(3), history=HistoryInjection(1), share_norms=False
        )
    },
    "long ends": {"recursion": replace(WISE, prelude_layers=2, coda_layers=3)},
    "long dense ends": {
        "recursion": replace(WISE, sharing="cycle", prelude_layers=2, coda_layers=3),
        "moe": EXPERTS,
        "dense_ends": True,
    },
    "DeepSeek-V2's": {
        "recursion": replace(WISE, kv_policy="recursive_sharing"),
        "latent_attention": LatentAttentionConfig(16, 8, 4, 12, q_lora_rank=24),
    },
    "DeepSeek-V2-Lite's": {
        "recursion": replace(
            WISE, kv_policy="exit_state", relaxation=Relaxation(2, projections=("output", "up"))
        ),
        "latent_attention": LatentAttentionConfig(16, 8, 8, 12),
        "rope_scaling": YarnScaling(40.0, 16, 2.0, 0.5, mscale=1.0, mscale_all_dim=0.7),
    },
    "Llama 3.1's rotation": {
        "recursion": WISE,
        "head_dim": 12,
        "rope_base": 500000.0,
        "rope_scaling": Llama3Scaling(8.0, 8192),
    },
    "linear scaling": {"recursion": WISE, "rope_scaling": LinearScaling(3.0)},
    "Qwen's YaRN": {
        "recursion": WISE,
        "head_dim": 12,
        "rope_scaling": YarnScaling(4.0, 16, 2.0, 0.5, truncate=False),
    },
    "DeepSeek-V3's experts": {
        "num_unrolled_layers": 4,
        "recursion": RecursionConfig(1, prelude_layers=1, coda_layers=0),
        "moe": DEEPSEEK,
        "dense_ends": True,
        "latent_attention": LatentAttentionConfig(16, 8, 4, 12, q_lora_rank=24),
        "multi_token_prediction": MultiTokenPrediction(),
    },
    "DeepSeek-V3's experts, three steps": {"recursion": WISE, "moe": DEEPSEEK},
    "DeepSeek-V2's experts": {
        "recursion": replace(WISE, kv_policy="exit_state"),
        "moe": MoEConfig(
            8,
            2,
            24,
            normalizes_gates=False,
            gate_scale=2.0,
            num_groups=4,
            groups_per_token=2,
            shared_ffn_hidden_size=20,
        ),
    },
    "heads that predict further tokens": {
        "recursion": WISE,
        "multi_token_prediction": MultiTokenPrediction(2, 0.3),
    },
    "heads with experts, latent attention": {
        "recursion": replace(WISE, prelude_layers=2, coda_layers=0),
        "moe": EXPERTS,
        "dense_ends": True,
        "latent_attention": LatentAttentionConfig(16, 8, 4, 12),
        "multi_token_prediction": MultiTokenPrediction(),
    },
    "layers that route by themselves": {
        "recursion": RecursionConfig(
            1, "middle_sequence", ExpertChoice(capacity_factors=(0.5,)), anchor_every=2
        )
    },
    "several recursions": {
        "recursion": (
            RecursionConfig(2, "sequence", prelude_layers=1, block_layers=1, share_norms=False),
            replace(WISE, sharing="cycle", step_embeddings=True, prelude_layers=1, coda_layers=1),
        )
    },
    "no recursion": {"moe": EXPERTS, "dense_ends": True},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "one rank": (1, {}, False),
    "ep": (2, {"ep": 2}, False),
    "pp": (2, {"pp": 2}, False),
    "tp+sp": (2, {"tp": 2}, True),
}
SAMPLE = [
    ("dense", "tp+sp"),
    ("deltas", "tp+sp"),
    ("dense ends", "ep"),
    ("own attention", "tp+sp"),
    ("own MLPs", "tp+sp"),
    ("static streams beside experts", "ep"),
    ("history, modulated norms", "tp+sp"),
    ("long ends", "tp+sp"),
    ("long ends", "pp"),
    ("an expert router a step", "tp+sp"),
    ("DeepSeek-V2-Lite's", "tp+sp"),
    ("several recursions", "pp"),
    ("Qwen's YaRN", "tp+sp"),
    ("DeepSeek-V3's experts", "ep"),
    ("DeepSeek-V3's experts, three steps", "tp+sp"),
    ("heads with experts, latent attention", "tp+sp"),
    ("no recursion", "pp"),
    ("depth and width", "one rank"),
]
CASES = [
    pytest.param(m, l, marks=() if (m, l) in SAMPLE else pytest.mark.full)
    for m in MODELS
    for l in LAYOUTS  # noqa: E741
    if l != "ep" or "moe" in MODELS[m]
]


@dataclass(frozen=True)
class Found:
    """What there and back came to, on one rank."""

    logits: float
    """Largest difference from the torch model's, on ranks that have logits."""
    changed: list[str] | None
    """Tensors that are not what they were; None where there are none."""


def there_and_back(model: dict[str, Any], layout: dict[str, Any], sp: bool) -> Found:
    setup.initialize(**layout)
    torch.manual_seed(0)
    decoder = DecoderConfig(64, 32, 64, **{"num_unrolled_layers": 8, "num_heads": 4} | model)
    ours = MoRTransformer(decoder).eval()
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            if tensor.is_floating_point() and tensor.isfinite().all():
                tensor.add_(0.1 * torch.randn_like(tensor))
    ids = torch.randint(0, 64, (2, 12))
    theirs = gpt(decoder, sp)
    load_tensors([theirs], megatron_tensors(ours.state_dict(), decoder))
    with torch.no_grad(), causal_routing(theirs):
        logits = logits_through_stages(theirs, ids)
        expected = ours(ids, causal_routing=True).logits
    whole, changed = whole_tensors([theirs]), None
    if whole is not None:
        back, state = decoder_tensors(whole, decoder), ours.state_dict()
        assert back.keys() == state.keys()
        changed = [name for name in state if not torch.equal(back[name], state[name])]
    return Found(0.0 if logits is None else (logits - expected).abs().max().item(), changed)


def logits_through_stages(model: GPTModel, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits `[b s v]` through Megatron's own schedule; None before the last stage."""

    def forward_step(data: Any, model: GPTModel) -> Any:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return model(ids, positions, None), lambda logits, non_loss_data: logits

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        micro_batch_size=len(ids),
        seq_length=ids.shape[1],
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outputs[0] if outputs else None


def gpt(decoder: DecoderConfig, sequence_parallel: bool) -> GPTModel:
    """The same model through Megatron, whatever its weights."""
    options: dict[str, Any] = {}
    if decoder.moe is not None:
        at_ends = 0 if decoder.dense_ends else 1
        before, after = decoder.schedule.prelude, decoder.schedule.coda
        between = decoder.num_unrolled_layers - before - after
        options = {
            "num_moe_experts": decoder.moe.num_experts,
            "moe_router_topk": decoder.moe.experts_per_token,
            "moe_ffn_hidden_size": decoder.moe.ffn_hidden_size,
            "moe_layer_freq": [at_ends] * before + [1] * between + [at_ends] * after,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_score_function": decoder.moe.scores,
            "moe_router_pre_softmax": not decoder.moe.normalizes_gates,
            "moe_router_topk_scaling_factor": decoder.moe.gate_scale,
            "moe_router_enable_expert_bias": decoder.moe.bias_update_rate > 0,
            "moe_shared_expert_intermediate_size": decoder.moe.shared_ffn_hidden_size or None,
        }
        if decoder.moe.num_groups > 1:
            options |= {
                "moe_router_num_groups": decoder.moe.num_groups,
                "moe_router_group_topk": decoder.moe.groups_per_token,
            }
    latent = decoder.latent_attention
    rotary = rotary_settings(decoder.rope_base, decoder.rope_scaling, latent is not None)
    if latent is not None:
        options |= {
            "multi_latent_attention": True,
            "q_lora_rank": latent.q_lora_rank,
            "kv_lora_rank": latent.kv_lora_rank,
            "qk_head_dim": latent.qk_nope_head_dim,
            "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
            "v_head_dim": latent.v_head_dim,
            **rotary.latent,
        }
    heads = decoder.multi_token_prediction
    if heads is not None:
        options |= {
            "mtp_num_layers": heads.num_heads,
            "mtp_loss_scaling_factor": heads.loss_coefficient,
        }
    config = setup.tiny_config(
        num_layers=decoder.num_unrolled_layers,
        num_query_groups=decoder.kv_heads,
        kv_channels=decoder.head_size,
        add_qkv_bias=decoder.qkv_bias,
        qk_layernorm=decoder.qk_norm or latent is not None,
        sequence_parallel=sequence_parallel,
        layernorm_epsilon=decoder.rms_norm_epsilon,
        **options,
    )
    rotary.set_attributes(config)
    without_experts = copy.copy(config)
    without_experts.num_moe_experts = None
    dense, inner = default_layer_spec(without_experts), default_layer_spec(config)
    ends = dense if decoder.dense_ends else inner
    if decoder.recursion is not None:
        block = recursion_block_spec(config, decoder.recursion, inner, dense_layer_spec=ends)
    else:
        layers = [ends, *[inner] * (config.num_layers - 2), ends]
        first = get_transformer_layer_offset(config)
        here = slice(first, first + get_num_layers_to_build(config))
        block = TransformerBlockSubmodules(layer_specs=layers[here], layer_norm=Norm)
    return GPTModel(
        config,
        block,
        vocab_size=decoder.vocab_size,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **rotary.model,
        parallel_output=False,
        share_embeddings_and_output_weights=decoder.tie_embeddings,
        mtp_block_spec=mtp_block_spec(config),
    ).eval()


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_weights_go_there_and_back(pool: WorkerPool, model: str, layout: str) -> None:
    ranks, parallel, sp = LAYOUTS[layout]
    found = pool.run(there_and_back, ranks, model=MODELS[model], layout=parallel, sp=sp)
    assert [f.changed for f in found] == [[], *[None] * (ranks - 1)]
    assert max(f.logits for f in found) < 1e-5


def gradients_of_heads(model: dict[str, Any]) -> dict[str, float]:
    """Largest differences of gradients with those of the torch model, and the largest gradient."""
    setup.initialize()
    torch.manual_seed(0)
    decoder = DecoderConfig(64, 32, 64, num_unrolled_layers=8, num_heads=4, **model)
    ours, ids = MoRTransformer(decoder), torch.randint(0, 64, (2, 12))
    theirs = gpt(decoder, False).train()
    theirs.output_layer.gather_output = False  # as Megatron's loss expects it
    load_tensors([theirs], megatron_tensors(ours.state_dict(), decoder))
    labels, positions = torch.randint(0, 64, (2, 12)), torch.arange(12).expand(2, 12)
    ours(ids, labels=labels).loss.backward()
    theirs(ids, positions, None, labels=labels).mean().backward()
    differences = {"size": 1.0}
    for head, other in zip(ours.prediction_heads, theirs.mtp.layers, strict=True):
        pairs = {
            "projection": (head.projection.weight, other.eh_proj.weight),
            "norm": (head.norm.weights[0], other.final_layernorm.weight),
            "down": (
                head.layers.layers[0].mlp.down.weight,
                other.mtp_model_layer.mlp.linear_fc2.weight,
            ),
        }
        for name, (own, wanted) in pairs.items():
            difference = (own.grad - wanted.grad).abs().max().item()
            differences[name] = max(differences.get(name, 0.0), difference)
            differences["size"] = min(differences["size"], wanted.grad.abs().max().item())
    own, wanted = ours.embedding.weight, theirs.embedding.word_embeddings.weight
    return differences | {"embedding": (own.grad - wanted.grad).abs().max().item()}


def test_heads_get_megatrons_gradients(pool: WorkerPool) -> None:
    model = {
        "recursion": RecursionConfig(3),
        "multi_token_prediction": MultiTokenPrediction(2, 0.3),
    }
    found = pool.run(gradients_of_heads, 1, model=model)[0]
    assert found.pop("size") > 1e-4
    assert max(found.values()) < 1e-6


@pytest.mark.parametrize(
    ("moe", "reason"),
    [
        (MoEConfig(4, 2, bias_update_rate=0.1), "bias_update_rate=0.1 adds a bias to softmax"),
        (replace(DEEPSEEK, normalizes_gates=False), "normalizes_gates=False with sigmoid scores"),
        (replace(DEEPSEEK, experts_per_token=2), r"best 1 scores \(2 // 2\), and this model by 2"),
        (MoEConfig(8, 6, num_groups=4, groups_per_token=3), r"scores \(6 // 3\), and .* by 1"),
    ],
)
def test_experts_that_megatron_chooses_otherwise_are_refused(moe: MoEConfig, reason: str) -> None:
    decoder = DecoderConfig(64, 32, 64, 8, 4, recursion=WISE, moe=moe)
    with pytest.raises(ValueError, match=reason):
        megatron_names(decoder, [])
