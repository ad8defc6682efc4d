"""Reads Llama and Qwen checkpoints as plain decoders, and writes decoders as such checkpoints.

SmolLM is a Llama. A Mistral without a sliding window differs from a Llama only in name. Qwen2 adds
biases to queries, keys and values, and Qwen3 adds norms of queries and keys. A checkpoint that uses
an unsupported setting is rejected with an error that names the setting.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mor_huggingface.checkpoints.rope import read_rope, write_rope
from mor_layers import DecoderConfig, FixedDepth
from mor_layers.settings.field_types import shown
from mor_layers.weights import (
    CONFIG,
    LazyTensors,
    StoredModel,
    carried,
    dtype_name,
    fitting,
    layer_names,
    open_tensors,
    read_config,
    require_layers,
    require_supported,
    side_files,
    unrolled_layers,
    unrolled_weights,
    write_folder,
)

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
}
"""The only supported value of each of these fields, if the field is given."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
"""Defaults of missing fields, where these differ from those of a Llama."""


def open_llama(folder: Path) -> StoredModel:
    """Open a Llama checkpoint. Its tensors are read on access.

    Raises:
        ValueError: a setting is not supported, or a file is missing or damaged.
        FileNotFoundError: the folder does not exist.
    """
    values = read_config(folder)
    config = config_from_llama(values, str(folder / CONFIG))
    tensors = open_tensors(folder)
    require_layers(config, len(tensors), folder)
    names = llama_names(config)
    # Older files also contain a tied head, and rotary frequencies that follow from the settings.
    left_out = {"lm_head.weight"} if config.tie_embeddings else set()
    kept = [n for n in tensors if n not in left_out and not n.endswith("rotary_emb.inv_freq")]
    weights = fitting(config, names, LazyTensors(kept, tensors.__getitem__), folder)
    return StoredModel(config, weights, carried(values), side_files(folder))


def write_llama(
    model: StoredModel, folder: Path, written: Callable[[str], None] | None = None
) -> None:
    """Write a Llama checkpoint into an existing folder, tensor by tensor. Recursions are unrolled.

    Raises:
        ValueError: the model routes tokens, shares keys and values, or has experts.
    """
    config = model.config
    values = llama_config(config)
    plain, weights = unrolled_weights(model.weights, config)
    names = {theirs: ours for ours, theirs in llama_names(plain).items()}
    tensors = LazyTensors(list(names), lambda name: weights[names[name]])
    values |= {"dtype": dtype_name(model), **model.facts}
    write_folder(model, folder, values, tensors, written)


def config_from_llama(values: Mapping[str, Any], where: str = CONFIG) -> DecoderConfig:
    """Convert the settings in a Llama's config.json to a DecoderConfig.

    Raises:
        ValueError: a setting is missing or not supported.
    """
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"{where}: model_type={shown(kind)} is not supported. Use one of {', '.join(MODEL_TYPES)}."
        )
    values = _DEFAULTS.get(kind, {}) | dict(values)
    if kind in ("qwen2", "qwen3") and not values.get("use_sliding_window"):
        values["sliding_window"] = None  # without use_sliding_window, Qwen ignores sliding_window
    require_supported(values, _ONLY, where)
    base, scaling = read_rope(values, where)
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    for name in (*needed, "num_attention_heads"):
        if not isinstance(values.get(name), int):
            raise ValueError(f"{where}: {name}={shown(values.get(name))} must be an integer.")
    epsilon = values.get("rms_norm_eps", 1e-6)
    if not isinstance(epsilon, int | float):
        raise ValueError(f"{where}: rms_norm_eps={shown(epsilon)} must be a number.")
    heads, head_dim = values["num_attention_heads"], values.get("head_dim")
    if not isinstance(head_dim, int | None):
        raise ValueError(f"{where}: head_dim={shown(head_dim)} must be an integer, or null.")
    if head_dim is not None and head_dim * heads == values["hidden_size"]:
        head_dim = None  # our default
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_unrolled_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        rms_norm_epsilon=float(epsilon),
        rope_base=base,
        rope_scaling=scaling,
        tie_embeddings=values.get("tie_word_embeddings", False),
    )


def llama_config(config: DecoderConfig) -> dict[str, Any]:
    """Convert a DecoderConfig to the settings of a Llama.

    Raises:
        ValueError: the model routes tokens, shares keys and values, or has experts.
    """
    if config.moe is not None:
        raise ValueError("moe is set, but a Llama has no experts. Keep the model in our format.")
    for recursion in (part.effective_recursion for part in config.parts):
        if not isinstance(recursion.router, FixedDepth) or recursion.kv_policy != "recursion_wise":
            raise ValueError(
                f"router={type(recursion.router).__name__} with kv_policy={recursion.kv_policy!r} "
                "cannot be written as a Llama, only FixedDepth with 'recursion_wise'. Keep the model "
                "in our format, which AutoModelForCausalLM loads after `import mor_huggingface`."
            )
    for name in config.beyond_llama:
        raise ValueError(
            f"{name}={getattr(config, name)} cannot be written as a Llama. Keep the model in our format."
        )
    if config.latent_attention is not None:
        raise ValueError(
            f"latent_attention={config.latent_attention} cannot be written as a Llama, which has "
            "grouped-query attention. Keep the model in our format."
        )
    if config.qkv_bias and config.qk_norm:
        raise ValueError(
            "qkv_bias and qk_norm are both set, but Qwen2 has only the former and Qwen3 only the "
            "latter. Keep the model in our format."
        )
    kind, name = ("qwen2", "Qwen2") if config.qkv_bias else ("llama", "Llama")
    kind, name = ("qwen3", "Qwen3") if config.qk_norm else (kind, name)
    return {
        "model_type": kind,
        "architectures": [f"{name}ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_unrolled_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.rms_norm_epsilon,
        **write_rope(config),
        "tie_word_embeddings": config.tie_embeddings,
    }


def llama_names(config: DecoderConfig) -> dict[str, str]:
    """The name in a Llama checkpoint of each tensor of a plain decoder."""
    assert config.recursion is None
    names = {"embedding.weight": "model.embed_tokens.weight"}
    for depth, (layer, _) in enumerate(unrolled_layers(config)):
        names |= layer_names(config, layer, f"model.layers.{depth}")
    names["norm.weights.0"] = "model.norm.weight"
    if not config.tie_embeddings:
        names["output.weight"] = "lm_head.weight"
    return names
