"""Converts our settings to those of the published code. This is the inverse of `published`."""

from typing import Any

from mor_layers import DecoderConfig, ExpertChoice, RecursionConfig, TokenChoice

_KV_POLICIES = ("recursion_wise", "recursive_sharing", "sharing_with_update")


def published_settings(config: DecoderConfig) -> dict[str, Any]:
    """The sections `architecture`, `recursive`, `kv_sharing` and `mor` of the published settings.

    `config_from_published` is the inverse.

    Raises:
        ValueError: the published code does not support a setting.
    """
    _check_decoder(config)
    recursion = config.effective_recursion
    shares = recursion.kv_policy != "recursion_wise"
    enabled = config.recursion is not None
    return {
        "architecture": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.ffn_hidden_size,
            "num_hidden_layers": config.num_unrolled_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.kv_heads,
            "rms_norm_eps": config.rms_norm_epsilon,
            "rope_theta": config.rope_base,
            "tie_word_embeddings": config.tie_embeddings,
        },
        "recursive": {
            "enable": enabled,
            "base_depth": None,
            "num_recursion": recursion.num_recursions,
            "sharing": recursion.sharing,
            "ln_share": recursion.share_norms,
            "initialization": "random",
        },
        "kv_sharing": {
            "enable": shares,
            "base_depth": None,
            "num_recursion": recursion.num_recursions if shares else None,
            "sharing": recursion.sharing if shares else None,
            "update_cache": recursion.kv_policy == "sharing_with_update",
        },
        "mor": _mor(recursion),
    }


def _check_decoder(config: DecoderConfig) -> None:
    refused = {
        "moe": config.moe is not None,
        "rope_scaling": config.rope_scaling is not None,
        "latent_attention": config.latent_attention is not None,
        "head_dim": config.head_size * config.num_heads != config.hidden_size,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        **dict.fromkeys(config.beyond_llama, True),
    }
    for name in (name for name, is_set in refused.items() if is_set):
        _refuse(name, getattr(config, name))
    recursion = config.effective_recursion
    if recursion.kv_policy not in _KV_POLICIES:
        _refuse("kv_policy", recursion.kv_policy)
    if recursion.relaxation is not None:
        _refuse("relaxation", recursion.relaxation)
    require_published_ends(config)


def require_published_ends(config: DecoderConfig) -> None:
    """Raise ValueError unless prelude and coda are as long as the published schemes have them, and
    one router decides for the whole block."""
    recursion = config.effective_recursion
    if recursion.routes_by_layer:
        _refuse("num_recursions=1 with a router of each layer, sharing", recursion.sharing)
    if config.schedule.has_published_ends:
        return
    raise ValueError(
        f"published checkpoints cannot express prelude_layers={recursion.prelude_layers} and "
        f"coda_layers={recursion.coda_layers}: their lengths follow from "
        f"sharing={recursion.sharing!r}. Keep the model in our format."
    )


def _mor(recursion: RecursionConfig) -> dict[str, Any]:
    router = recursion.router
    place = router.published_for(recursion.num_recursions)
    for name in place.without_place:
        _refuse(name, getattr(router, name))
    return _unrouted() | dict(place.settings)


def _unrouted() -> dict[str, Any]:
    """The section `mor` without a router. Like the published files, it lists both kinds of routers."""
    expert, token = (kind().published_for(1).settings for kind in (ExpertChoice, TokenChoice))
    return {
        "enable": False,
        "type": "expert",
        "capacity": None,
        "rand_router": False,
        "router_type": "linear",
        "z_loss": False,
        "z_coeff": 0.0,
        "temp": 1.0,
        "expert": expert["expert"],
        "token": token["token"],
    }


def _refuse(name: str, value: object) -> None:
    raise ValueError(
        f"{name}={value!r} is not supported by the published code. Keep the model in our format."
    )
