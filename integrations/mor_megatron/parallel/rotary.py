"""Megatron's settings for a rotary position embedding, without Megatron-Core."""

from dataclasses import dataclass, field
from typing import Any

from mor_layers.models import Llama3Scaling, RopeScaling, YarnScaling

_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""What Megatron's `rope_scaling` has built in: the values of Llama 3.1 and 3.2."""


@dataclass(frozen=True)
class RotarySettings:
    """Where Megatron reads what about a rotary embedding."""

    model: dict[str, Any]
    """Arguments of `GPTModel`."""
    latent: dict[str, Any] = field(default_factory=dict)
    """Fields of `MLATransformerConfig`; empty without multi-latent attention."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Attributes of the configuration that are no fields of it: `yarn_*`, which `GPTModel` and its
    attention look for. A run's own configuration may have them as fields."""

    def set_attributes(self, config: Any) -> None:
        """Set `attributes` on a `TransformerConfig`. Without YaRN there are none."""
        for name, value in self.attributes.items():
            setattr(config, name, value)


def rotary_settings(
    base: float, scaling: RopeScaling | None, is_latent: bool = False
) -> RotarySettings:
    """The settings for base and scaling of a `DecoderConfig`.

    Args:
        base: `rope_base`.
        scaling: `rope_scaling`.
        is_latent: whether the model has multi-latent attention.

    Raises:
        ValueError: Megatron does not have this scaling.
    """
    model: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": base}
    if is_latent:
        return RotarySettings(model, {"rotary_base": base, **_latent(scaling)})
    if scaling is None:
        return RotarySettings(model)
    if isinstance(scaling, YarnScaling):
        model["position_embedding_type"] = "yarn"
        return RotarySettings(model, attributes=_yarn(scaling))
    if isinstance(scaling, Llama3Scaling):
        _require(scaling, **_LLAMA3)
        return RotarySettings(model | {"rope_scaling": True, "rope_scaling_factor": scaling.factor})
    return RotarySettings(model | {"seq_len_interpolation_factor": scaling.factor})


def _yarn(scaling: YarnScaling) -> dict[str, Any]:
    _require(scaling, attention_factor=None)
    has_both = bool(scaling.mscale and scaling.mscale_all_dim)
    return {
        "yarn_rotary_scaling_factor": scaling.factor,
        "yarn_original_max_position_embeddings": scaling.original_max_position_embeddings,
        "yarn_beta_fast": scaling.beta_fast,
        "yarn_beta_slow": scaling.beta_slow,
        "yarn_mscale": scaling.mscale if has_both else None,
        "yarn_mscale_all_dim": scaling.mscale_all_dim if has_both else None,
        "yarn_correction_range_round_to_int": scaling.truncate,
    }


def _latent(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "rope"}  # Megatron scales positions by default
    if not isinstance(scaling, YarnScaling):
        raise ValueError(
            f"rope_scaling={scaling} is not supported by Megatron's multi-latent attention, which has "
            "YaRN only. Use YarnScaling, or none."
        )
    _require(scaling, attention_factor=None, truncate=True)
    if scaling.mscale_all_dim and not scaling.mscale:
        raise ValueError(
            f"rope_scaling with mscale_all_dim={scaling.mscale_all_dim} needs an mscale in Megatron's "
            "multi-latent attention, which otherwise takes 1. Set mscale, as DeepSeek does."
        )
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "mscale": scaling.mscale if scaling.mscale and scaling.mscale_all_dim else 1.0,
        "mscale_all_dim": scaling.mscale_all_dim or 0.0,
    }


def _require(scaling: RopeScaling, **supported: object) -> None:
    """Raise ValueError for the first field that has another value."""
    for name, only in supported.items():
        if getattr(scaling, name) != only:
            raise ValueError(
                f"rope_scaling with {name}={getattr(scaling, name)} is not supported by Megatron, only "
                f"{only}. Use the PyTorch model."
            )
