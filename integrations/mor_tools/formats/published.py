"""Names and settings of the published Mixture-of-Recursions checkpoints.

The released implementation (Bae et al. 2025) lists every unrolled layer under a name of its own and
ties their tensors. In our models each tensor has one name. This module maps between the two.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    FixedDepth,
    MoRTransformer,
    RecursionConfig,
    RouterConfig,
    TokenChoice,
)
from mor_layers.weights import layer_names
from mor_tools.formats.published_settings import require_published_ends


def config_from_published(settings: Mapping[str, Any]) -> DecoderConfig:
    """Convert published settings to a DecoderConfig.

    Args:
        settings: the sections `architecture` (a Llama configuration), `recursive`, `kv_sharing` and
            `mor`, named as in the YAML files of the released implementation.
    """
    architecture = settings["architecture"]
    return DecoderConfig(
        vocab_size=architecture["vocab_size"],
        hidden_size=architecture["hidden_size"],
        ffn_hidden_size=architecture["intermediate_size"],
        num_unrolled_layers=architecture["num_hidden_layers"],
        num_heads=architecture["num_attention_heads"],
        num_kv_heads=architecture["num_key_value_heads"],
        rms_norm_epsilon=architecture["rms_norm_eps"],
        rope_base=architecture["rope_theta"],
        tie_embeddings=architecture.get("tie_word_embeddings", False),
        recursion=_recursion(settings),
    )


def _recursion(settings: Mapping[str, Any]) -> RecursionConfig | None:
    recursive, sharing = settings["recursive"], settings["kv_sharing"]
    if not recursive["enable"]:
        return None
    kv_policy = "recursion_wise"
    if sharing["enable"]:
        kv_policy = "sharing_with_update" if sharing["update_cache"] else "recursive_sharing"
    return RecursionConfig(
        num_recursions=recursive["num_recursion"],
        sharing=recursive["sharing"],
        router=_router(settings["mor"]),
        kv_policy=kv_policy,
        share_norms=recursive["ln_share"],
    )


def _router(mor: Mapping[str, Any]) -> RouterConfig:
    if not mor["enable"]:
        return FixedDepth()
    own = mor[mor["type"]]
    z_loss = mor["z_coeff"] if mor["z_loss"] else 0.0
    if mor["type"] == "expert":
        return ExpertChoice(
            architecture=mor["router_type"],
            # The released code ignores alpha if there is no activation.
            activation=own["router_func"] or "none",
            alpha=own["alpha"] if own["router_func"] else 1.0,
            temperature=mor["temp"],
            capacity_factors=tuple(float(c) for c in mor["capacity"].split(",")),
            warmup_steps=own["cap_warmup_step"],
            predictor=own["sampling"],
            predictor_coefficient=own["coeff"] if own["sampling"] == "aux_loss" else None,
            z_loss_coefficient=z_loss,
            combine=own["gating"],
        )
    return TokenChoice(
        architecture=mor["router_type"],
        activation=own["router_func"],
        alpha=own["alpha"],
        temperature=mor["temp"],
        balancing=own["balancing"],
        balancing_coefficient=own["coeff"] if own["balancing"] == "loss" else own["u"],
        z_loss_coefficient=z_loss,
        combine=own["gating"],
    )


def published_names(config: DecoderConfig) -> dict[str, str]:
    """The published name of each tensor of a `MoRTransformer` with these settings.

    Raises:
        ValueError: the published implementation does not support a setting.
    """
    config.only_recursion("the published format")
    beyond = config.effective_recursion.beyond_published
    if beyond:
        raise ValueError(
            f"{beyond[0]} is set, but the published implementation does not support it. Keep the "
            "model in our format."
        )
    require_published_ends(config)
    names = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weights.0": "model.norm.weight",
    }
    if not config.tie_embeddings:
        names["output.weight"] = "lm_head.weight"
    recursion, schedule = config.effective_recursion, config.schedule
    size, steps = schedule.block_size, recursion.num_recursions
    if schedule.prelude:
        names |= layer_names(config, "prelude.layers.0", "model.layers.0")
    for ours, places in _shared_layers(config).items():
        for norm in range(1 if recursion.share_norms else steps):
            renamed = layer_names(config, ours, places[norm], norm)
            names |= {o: t for o, t in renamed.items() if norm == 0 or _is_norm(o)}
    if schedule.coda:
        layers = recursion.router.published_for(steps).layers
        entries = {"every_pass": size * steps, "every_step": steps, "one_entry": 1}[layers]
        last = f"model.layers.{schedule.prelude + entries}"
        names |= layer_names(config, "coda.layers.0", last)
    names |= dict(_router_names(recursion, schedule.prelude))
    return names


def published_aliases(config: DecoderConfig) -> dict[str, str]:
    """The additional names of tensors that a published checkpoint lists more than once.

    Maps each to the name in `published_names` of the tensor that it is tied to.
    """
    own_norms = not config.effective_recursion.share_norms
    aliases = {}
    for ours, (first, *later) in _shared_layers(config).items():
        for name, theirs in layer_names(config, ours, first).items():
            if not (own_norms and _is_norm(name)):
                end = theirs.removeprefix(first)
                aliases |= {f"{place}{end}": theirs for place in later}
    if config.tie_embeddings:
        aliases["lm_head.weight"] = "model.embed_tokens.weight"
    return aliases


def _shared_layers(config: DecoderConfig) -> dict[str, list[str]]:
    """For each shared layer, its published name at every step."""
    recursion, schedule = config.effective_recursion, config.schedule
    first, size, steps = schedule.prelude, schedule.block_size, recursion.num_recursions
    layers = recursion.router.published_for(steps).layers

    def place(layer: int, step: int) -> str:
        if layers == "every_step":
            return f"model.layers.{first + step}.block.{layer}"
        if layers == "one_entry":
            return f"model.layers.{first}.block_list.{step}.{layer}"
        stride = step * size + layer if schedule.is_cyclic else layer * steps + step
        return f"model.layers.{first + stride}"

    ours = (
        "recursions.0.layers.layers.{}" if schedule.is_cyclic else "recursions.{}.layers.layers.0"
    )
    return {ours.format(n): [place(n, step) for step in range(steps)] for n in range(size)}


def _is_norm(ours: str) -> bool:
    """Whether a tensor belongs to a norm, which each step may have separately."""
    return "attention_norm." in ours or "mlp_norm." in ours


def _router_names(recursion: RecursionConfig, first: int) -> Iterator[tuple[str, str]]:
    """Our name and the published name of each tensor of the router.

    Args:
        first: index of the recursion's first entry in the published list of layers.
    """
    place = recursion.router.published_for(recursion.num_recursions)
    for ours, (entry, theirs) in place.names.items():
        yield f"recursions.0.router.{ours}", f"model.layers.{first + entry}.{theirs}"


def from_published(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> MoRTransformer:
    """Make a model with the settings and weights of a published checkpoint.

    Args:
        settings: see `config_from_published`.
        weights: tensors by published name, for example from `safetensors.torch.load_file`.

    Raises:
        ValueError: a weight is missing, or has another shape.
    """
    model = MoRTransformer(config_from_published(settings))
    load_published(model, weights)
    return model


def load_published(model: MoRTransformer, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of a published checkpoint into `model`.

    Raises:
        ValueError: a weight is missing, or has another shape.
    """
    state = model.state_dict()
    with torch.no_grad():
        for ours, theirs in published_names(model.config).items():
            if theirs not in weights:
                raise ValueError(
                    f"the checkpoint has no {theirs!r} (for {ours!r}). Check that the settings are "
                    "those that it was trained with."
                )
            if weights[theirs].shape != state[ours].shape:
                raise ValueError(
                    f"{theirs!r} has shape {tuple(weights[theirs].shape)}, but {ours!r} needs "
                    f"{tuple(state[ours].shape)}."
                )
            state[ours].copy_(weights[theirs])
