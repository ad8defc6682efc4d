"""A run's model described as a plain PyTorch decoder; Megatron-Core is not needed for that."""

import math

from mor_layers import DecoderConfig, MoEConfig
from mor_tools.pretraining.settings import Settings

VOCABULARY_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, so that it has the same size for all usual
tensor-parallel sizes."""


def padded_vocabulary(settings: Settings, vocab_size: int) -> int:
    """Number of rows of the embedding, padding included."""
    multiple = math.lcm(VOCABULARY_MULTIPLE, settings.parallel.tensor)
    return -(-vocab_size // multiple) * multiple


def decoder_config(settings: Settings, vocab_size: int) -> DecoderConfig:
    """The configuration of the same model in plain PyTorch."""
    model, experts = settings.model, None
    if model.moe is not None:
        experts = MoEConfig(
            model.moe.num_experts,
            model.moe.experts_per_token,
            model.moe.ffn_hidden_size,
            model.moe.balance_coefficient,
            model.moe.z_loss_coefficient,
        )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_unrolled_layers=model.num_unrolled_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
        rms_norm_epsilon=model.rms_norm_epsilon,
        rope_base=model.rope_base,
        rope_scaling=model.rope_scaling,
        tie_embeddings=model.tie_embeddings,
        recursion=settings.recursion,
        latent_attention=model.latent_attention,
        moe=experts,
        dense_ends=any(dense_ends(settings)),
    )


def dense_ends(settings: Settings) -> tuple[int, int]:
    """In a model with experts: how many of the first and of the last layers have none."""
    moe, schedule = settings.model.moe, settings.schedule
    if moe is None or not moe.dense_ends:
        return 0, 0
    return (1, 1) if schedule is None else (schedule.prelude, schedule.coda)
