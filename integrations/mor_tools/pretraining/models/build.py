"""Builds the model: an unmodified GPTModel whose layers come from `mor_megatron`'s specs."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn
from torch.nn import functional as F

from mor_layers import MoRTransformer
from mor_layers.costs import ModelShape, account, count_parameters
from mor_layers.weights import state_of
from mor_megatron import (
    Norm,
    SDPACoreAttention,
    connect_stages,
    default_layer_spec,
    recursion_block_spec,
    recursion_pipeline_spec,
)
from mor_megatron.checkpoints import decoder_tensors, whole_tensors
from mor_megatron.layers import validate
from mor_megatron.models import has_transformer_engine
from mor_megatron.parallel import RotarySettings, rotary_settings
from mor_megatron.pipeline.rules import validate_pipeline
from mor_megatron.training import weigh_loops
from mor_tools.pretraining.models.decoder import (
    decoder_config,
    layers_with_experts,
    padded_vocabulary,
    routed_shares,
)
from mor_tools.pretraining.settings import Settings


def check(settings: Settings) -> None:
    """Refuse what Megatron's layers do not support, before anything is written.

    Raises:
        ValueError: for the first such setting, with the reason and what to use instead.
    """
    config = transformer_config(settings)  # Megatron's own checks run in the constructor
    decoder_config(settings, settings.data.vocabulary_size)  # and so do the core's
    for recursion, schedule in zip(settings.recursions, settings.schedules, strict=True):
        validate(config, recursion)
        if settings.virtual_stages is not None:
            validate_pipeline(config, recursion, schedule)


def build_model(settings: Settings, vocab_size: int) -> list[GPTModel]:
    """This process's part of the model on its device: one chunk per virtual pipeline stage."""
    config = transformer_config(settings)
    stages = [None] if settings.virtual_stages is None else range(settings.virtual_stages)
    chunks = [
        _gpt(
            settings,
            config,
            vocab_size,
            stage,
            is_first=parallel_state.is_pipeline_first_stage(False, stage),
            is_last=parallel_state.is_pipeline_last_stage(False, stage),
        )
        for stage in stages
    ]
    if settings.virtual_stages is not None:
        connect_stages(chunks)
    weigh_loops(chunks)
    return [chunk.to(torch.cuda.current_device()) for chunk in chunks]


def build_teacher(settings: Settings, vocab_size: int) -> GPTModel:
    """A dense model of these sizes, complete on this pipeline stage and sharded over its
    tensor-parallel ranks.
    """
    parallel = replace(settings.parallel, pipeline=1, pipeline_layout="one_stage")
    training = replace(settings.training, recompute="none")
    dense = replace(settings, recursion=None, uptrain=None, parallel=parallel, training=training)
    config = transformer_config(dense)
    teacher = _gpt(dense, config, vocab_size, None, is_first=True, is_last=True)
    teacher = teacher.to(torch.cuda.current_device(), config.params_dtype)
    return teacher.requires_grad_(False).eval()


def _gpt(
    settings: Settings,
    config: TransformerConfig,
    vocab_size: int,
    stage: int | None,
    *,
    is_first: bool,
    is_last: bool,
) -> GPTModel:
    return GPTModel(
        config,
        transformer_layer_spec=_block(settings, config, stage),
        vocab_size=padded_vocabulary(settings, vocab_size),
        max_sequence_length=settings.data.sequence_length,
        pre_process=is_first,
        post_process=is_last,
        share_embeddings_and_output_weights=settings.model.tie_embeddings,
        vp_stage=stage,
        **_rotary(settings).model,
    )


def _rotary(settings: Settings) -> RotarySettings:
    model = settings.model
    return rotary_settings(model.rope_base, model.rope_scaling, model.latent_attention is not None)


def transformer_config(settings: Settings) -> TransformerConfig:
    """Megatron's configuration for these settings."""
    model, parallel, training = settings.model, settings.parallel, settings.training
    has_cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    fields: dict[str, Any] = {
        "num_layers": model.num_unrolled_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim or model.hidden_size // model.num_heads,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "layernorm_epsilon": model.rms_norm_epsilon,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": settings.virtual_stages,
        # With two stages, each is the other's previous and next one, and batched sends get mixed
        # up.
        "overlap_p2p_comm": settings.virtual_stages is not None,
        "batch_p2p_comm": settings.virtual_stages is None,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1 if parallel.expert > 1 else None,
        "bf16": training.precision == "bf16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        # Without CUDA there are no fused kernels, and weights are initialised on the host.
        "use_cpu_initialization": not has_cuda,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": has_cuda,
        "gradient_accumulation_fusion": False,
    }
    if training.recompute == "full":
        fields |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif training.recompute == "selective":
        fields |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if model.moe is not None:
        fields |= {
            "num_moe_experts": model.moe.num_experts,
            "moe_router_topk": model.moe.experts_per_token,
            "moe_ffn_hidden_size": model.moe.ffn_hidden_size,
            "moe_layer_freq": list(map(int, layers_with_experts(settings))),
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": model.moe.balance_coefficient,
            "moe_z_loss_coeff": model.moe.z_loss_coefficient or None,
            "moe_token_dispatcher_type": model.moe.dispatcher,
            "moe_grouped_gemm": has_cuda and has_transformer_engine(),
        }
    rotary, latent = _rotary(settings), model.latent_attention
    if latent is None:
        config = TransformerConfig(**fields)
        rotary.set_attributes(config)
        return config
    fields |= {
        "multi_latent_attention": True,
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "kv_channels": latent.head_size,
        "qk_layernorm": True,  # of latent rows
        **rotary.latent,
    }
    return MLATransformerConfig(**fields)


def torch_model(
    settings: Settings, chunks: list[nn.Module], vocab_size: int
) -> MoRTransformer | None:
    """The model in plain PyTorch, without padding of the vocabulary, on the first rank's device.

    Every rank must call it; all but the first get None.
    """
    tensors = whole_tensors(chunks)
    if tensors is None:
        return None
    config = decoder_config(settings, vocab_size)
    weights = state_of(config, decoder_tensors(tensors, config))
    for name in ("embedding.weight", "output.weight"):
        weights[name] = weights[name][:vocab_size]
    model = MoRTransformer(config)
    model.load_state_dict(weights)
    return model.to(torch.cuda.current_device())


def shape(settings: Settings, vocab_size: int) -> ModelShape:
    """The quantities that determine the model's cost."""
    return ModelShape.from_decoder(
        decoder_config(settings, padded_vocabulary(settings, vocab_size))
    )


def parameters(model: ModelShape) -> int:
    """Number of parameters of the whole model, counting each shared weight once."""
    return int(count_parameters(model).total)


def flops_per_token(model: ModelShape, settings: Settings, shares: Sequence[float] | None) -> float:
    """Training FLOPs per token if the fractions `shares` of the tokens run each recursion step.

    Without shares they are those of the settings, or, where these determine none, those of tokens of
    which equally many exit at each step.
    """
    length = settings.data.sequence_length
    tokens = None
    # Where layers route by themselves, a report's shares are means over them and the anchors, which say
    # less than the settings.
    if shares is not None and not settings.routes_by_layer:
        tokens = model.tokens_per_step(routed_shares(settings, shares), length)
    return account(model, length, tokens or model.planned_tokens(length)).flops_per_token()


def _block(
    settings: Settings, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    inner = _layer_spec(settings, config)
    has_experts = layers_with_experts(settings)
    ends = inner
    if any(has_experts) and not all(has_experts):
        without_experts = copy.copy(config)
        without_experts.num_moe_experts = None
        without_experts.moe_grouped_gemm = False
        ends = _layer_spec(settings, without_experts)
    if settings.virtual_stages is not None:
        # With causal routing, as in generation, the number of tokens that run a step varies.
        return recursion_pipeline_spec(
            config, settings.recursion, inner, vp_stage, ends, documents=True
        )
    if settings.recursion is not None:
        return recursion_block_spec(config, settings.recursion, inner, dense_layer_spec=ends)
    layers = [inner if has else ends for has in has_experts]
    first = get_transformer_layer_offset(config)
    return TransformerBlockSubmodules(
        layer_specs=layers[first : first + get_num_layers_to_build(config)], layer_norm=Norm
    )


def _layer_spec(settings: Settings, config: TransformerConfig) -> ModuleSpec:
    """Megatron's layer spec, with attention that respects masks if documents are kept apart."""
    spec = default_layer_spec(config)
    if not settings.data.reset_attention_mask:
        return spec
    # Transformer Engine's core attention, declared causal, would ignore the mask.
    attention = spec.submodules.self_attention
    parts = replace(attention.submodules, core_attention=SDPACoreAttention)
    attention = replace(attention, submodules=parts)
    return replace(spec, submodules=replace(spec.submodules, self_attention=attention))
