"""A run's model described as a plain PyTorch decoder; Megatron-Core is not needed for that."""

import math
from collections.abc import Sequence

from mor_layers import DecoderConfig, MoEConfig
from mor_layers.costs import RouterShape
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
        dense_ends=experts is not None and not all(layers_with_experts(settings)),
    )


def routed_shares(settings: Settings, shares: Sequence[float]) -> list[float]:
    """The shares of the tokens at steps that a router decides about, for `ModelShape.tokens_per_step`.

    Args:
        shares: at each step of one recursion after another.
    """
    routed, rest = list[float](), list(shares)
    for recursion, schedule in zip(settings.recursions, settings.schedules, strict=True):
        own, rest = rest[: recursion.num_recursions], rest[recursion.num_recursions :]
        if RouterShape.from_recursion(recursion, settings.model.hidden_size) is None:
            continue
        for block in range(schedule.num_blocks):
            routed += own if recursion.router_of(block) is recursion.router else []
    return routed


def layers_with_experts(settings: Settings) -> tuple[bool, ...]:
    """For each unrolled layer, whether it has experts."""
    moe, count = settings.model.moe, settings.model.num_unrolled_layers
    if moe is None or not moe.dense_ends:
        return (moe is not None,) * count
    if not settings.schedules:
        return (False, *(True,) * (count - 2), False)
    found: list[bool] = []
    for schedule in settings.schedules:
        shared = schedule.num_unrolled_layers - schedule.prelude - schedule.coda
        found += [False] * schedule.prelude + [True] * shared + [False] * schedule.coda
    return tuple(found)
