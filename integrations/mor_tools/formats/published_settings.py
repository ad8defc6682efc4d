"""Our settings as those of the published Mixture-of-Recursions code; the inverse of `published`."""

from typing import Any

from mor_layers import DecoderConfig, ExpertChoice, FixedDepth, RecursionConfig, TokenChoice

_KV_POLICIES = ("recursion_wise", "recursive_sharing", "sharing_with_update")


def published_settings(config: DecoderConfig) -> dict[str, Any]:
    """`architecture`, `recursive`, `kv_sharing` and `mor`, for `config_from_published` to take back.

    Raises:
        ValueError: the published code has no place for a setting.
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
        "head_dim": config.head_size * config.num_heads != config.hidden_size,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
    }
    for name in (name for name, is_set in refused.items() if is_set):
        _refuse(name, getattr(config, name))
    recursion = config.effective_recursion
    if recursion.kv_policy not in _KV_POLICIES:
        _refuse("kv_policy", recursion.kv_policy)
    if recursion.relaxation is not None:
        _refuse("relaxation", recursion.relaxation)
    if not isinstance(recursion.router, FixedDepth | ExpertChoice | TokenChoice):
        _refuse("router", type(recursion.router).__name__)


def _mor(recursion: RecursionConfig) -> dict[str, Any]:
    router = recursion.router
    expert = router if isinstance(router, ExpertChoice) else ExpertChoice()
    token = router if isinstance(router, TokenChoice) else TokenChoice()
    aux_coefficient = 0.001
    if expert.predictor == "aux_loss":
        aux_coefficient = expert.predictor_weight
    elif expert.predictor_weight != 1.0:
        _refuse("predictor_coefficient", expert.predictor_coefficient)
    if expert.threshold != ExpertChoice().threshold:
        _refuse("threshold", expert.threshold)
    if expert.activation == "none" and expert.alpha != 1.0:
        _refuse("alpha", expert.alpha)
    if token.balancing == "none":
        _refuse("balancing", token.balancing)
    routed = isinstance(router, ExpertChoice | TokenChoice)
    z_loss = router.z_loss_coefficient if isinstance(router, ExpertChoice | TokenChoice) else 0.0
    capacities = None
    if isinstance(router, ExpertChoice):
        factors = router.capacity_factors_for(recursion.num_recursions)
        capacities = ",".join(map(repr, factors))
    is_loss = token.balancing == "loss"
    return {
        "enable": routed,
        "type": "token" if isinstance(router, TokenChoice) else "expert",
        "capacity": capacities,
        "rand_router": False,
        "router_type": router.architecture if routed else "linear",  # type: ignore[union-attr]
        "z_loss": z_loss > 0,
        "z_coeff": z_loss,
        "temp": router.temperature if routed else 1.0,  # type: ignore[union-attr]
        "expert": {
            "cap_warmup_step": expert.warmup_steps,
            "router_func": None if expert.activation == "none" else expert.activation,
            "alpha": expert.alpha,
            "sampling": expert.predictor,
            "include_first": True,
            "coeff": aux_coefficient,
            "gating": expert.combine,
        },
        "token": {
            "bal_warmup_step": 0,
            "router_func": token.activation,
            "alpha": token.alpha,
            "balancing": token.balancing,
            "coeff": token.balancing_weight if is_loss else 0.1,
            "u": 0.001 if is_loss else token.balancing_weight,
            "gating": token.combine,
        },
    }


def _refuse(name: str, value: object) -> None:
    raise ValueError(
        f"{name}={value!r} has no place in a published checkpoint. Keep the model in our format."
    )
