"""Tiny twins: a recipe's settings with small sizes, to try it on a laptop."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mor_layers import RecursionConfig
from mor_layers.models import LatentAttentionConfig
from mor_layers.recursion import SharingSchedule
from mor_tools.pretraining.settings import ModelSettings, MoESettings, Settings

HIDDEN_SIZE, HEADS, STEPS = 32, 4, 2
MOST_LOOPS, MOST_LAYERS = 3, 2
"""Largest numbers of recursions, and of layers in prelude, block and coda."""
MOST_PLAIN_LAYERS = 8
"""Largest number of layers without recursion; that of a prelude, 2 × 3 layers, and a coda."""


def tiny_twin(settings: Settings) -> Settings:
    """The same model with small sizes, and a run of two steps on short sequences.

    All choices stay: sharing, router, KV policy, experts, norms and injections. Sizes, numbers of layers
    and of recursions, and lengths of schedules shrink.
    """
    pairs = zip(settings.recursions, settings.schedules, strict=True)
    recursions = tuple(_tiny_recursion(recursion, schedule) for recursion, schedule in pairs)
    training = replace(
        settings.training,
        steps=STEPS,
        global_batch_size=2,
        micro_batch_size=2,
        warmup_steps=0,
        decay_steps=1,
        precision="fp32",
        checkpoint_every=STEPS,
    )
    data = replace(settings.data, vocabulary_size=300, sequence_length=32, workers=0)
    evaluation = replace(settings.evaluation, every=STEPS, batches=1, sample_tokens=8)
    return replace(
        settings,
        output=f"{settings.output}_tiny",
        model=_tiny_model(settings, recursions),
        recursion=recursions or None,
        data=data,
        training=training,
        evaluation=evaluation,
        log_every=1,
    )


def _tiny_recursion(recursion: RecursionConfig, schedule: SharingSchedule) -> RecursionConfig:
    loops = min(recursion.num_recursions, MOST_LOOPS)
    changes: dict[str, Any] = {"num_recursions": loops}
    for name in ("prelude_layers", "coda_layers"):
        if getattr(recursion, name) is not None:
            changes[name] = min(getattr(recursion, name), MOST_LAYERS)
    if recursion.block_layers is not None:
        changes["block_layers"] = min(schedule.block_size, MOST_LAYERS)
    if recursion.relaxation is not None:
        changes["relaxation"] = replace(
            recursion.relaxation, rank=min(recursion.relaxation.rank, 4)
        )
    if recursion.history is not None:
        window = max(1, min(recursion.history.window, loops - 2))
        changes["history"] = replace(recursion.history, window=window)
    router = {}
    if getattr(recursion.router, "warmup_steps", 0):
        router["warmup_steps"] = STEPS
    if getattr(recursion.router, "backward_steps", None):
        router["backward_steps"] = min(recursion.router.backward_steps, loops - 1)  # type: ignore[attr-defined]
    for name in ("capacity_factors", "continue_shares"):
        shares = getattr(recursion.router, name, None)
        if shares is not None:
            router[name] = shares[: len(shares) - recursion.num_recursions + loops]
    return replace(recursion, router=replace(recursion.router, **router), **changes)


def _tiny_model(settings: Settings, recursions: Sequence[RecursionConfig]) -> ModelSettings:
    model = settings.model
    layers = 0 if recursions else min(model.num_unrolled_layers, MOST_PLAIN_LAYERS)
    for recursion, schedule in zip(recursions, settings.schedules, strict=True):
        layers += min(schedule.prelude, MOST_LAYERS) + min(schedule.coda, MOST_LAYERS)
        layers += min(schedule.block_size, MOST_LAYERS) * recursion.num_recursions
    return replace(
        model,
        hidden_size=HIDDEN_SIZE,
        ffn_hidden_size=2 * HIDDEN_SIZE,
        num_unrolled_layers=layers,
        num_heads=HEADS,
        num_kv_heads=max(1, HEADS * model.num_kv_heads // model.num_heads),
        head_dim=None if model.head_dim is None else HIDDEN_SIZE // HEADS,
        latent_attention=_tiny_latents(model.latent_attention),
        moe=None if model.moe is None else _tiny_experts(model.moe),
    )


def _tiny_latents(latent: LatentAttentionConfig | None) -> LatentAttentionConfig | None:
    if latent is None:
        return None
    head, queries = HIDDEN_SIZE // HEADS, None if latent.q_lora_rank is None else HIDDEN_SIZE // 2
    return LatentAttentionConfig(HIDDEN_SIZE // 2, head, head // 2, head, queries)


def _tiny_experts(moe: MoESettings) -> MoESettings:
    experts = min(moe.num_experts, 4)
    per_token = min(moe.experts_per_token, 2)
    return replace(
        moe, num_experts=experts, experts_per_token=per_token, ffn_hidden_size=HIDDEN_SIZE
    )
