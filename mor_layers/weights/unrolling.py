"""Turns a recursion without routing into the equivalent plain decoder, with its deltas merged.

config, weights = unrolled_weights(model.state_dict(), model.config)
plain = MoRTransformer(config)
plain.load_state_dict(dict(weights))
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from mor_layers.layers import Relaxation, merged_weight
from mor_layers.models import DecoderConfig
from mor_layers.routers import FixedDepth
from mor_layers.weights.names import layer_names, recursion_of, unrolled_layers
from mor_layers.weights.tensor_files import LazyTensors

_Delta = tuple[str, Relaxation]
"""Name of the delta of a step, and its settings."""


def require_unrollable(config: DecoderConfig) -> None:
    """Raise ValueError if no plain decoder computes the same as this model."""
    if config.moe is not None:
        raise ValueError("moe is set, but a plain decoder has no experts. Keep the model as it is.")
    for part in config.parts:
        _require_unrollable(part)


def _require_unrollable(part: DecoderConfig) -> None:
    merges, recursion = ("relaxation", "own_per_step"), part.effective_recursion
    beyond = [name for name in recursion.beyond_published if name not in merges]
    beyond += ["sum_norms"] * part.sum_norms
    beyond += ["multi_token_prediction"] * (part.multi_token_prediction is not None)
    if beyond:
        raise ValueError(
            f"{beyond[0]} is set, which a plain decoder does not support. Keep the model as it is."
        )
    if not isinstance(recursion.router, FixedDepth) or recursion.kv_policy != "recursion_wise":
        raise ValueError(
            f"router={type(recursion.router).__name__} with kv_policy={recursion.kv_policy!r} has "
            "no equivalent plain decoder, only FixedDepth with 'recursion_wise'. Keep the model "
            "as it is."
        )


def unrolled_weights(
    weights: Mapping[str, Tensor], config: DecoderConfig
) -> tuple[DecoderConfig, LazyTensors]:
    """The settings and weights of the equivalent plain decoder, made one tensor at a time.

    Args:
        weights: tensors under the names of a MoRTransformer's state dict.
        config: the model's settings; a model without recursion is returned unchanged.

    Raises:
        ValueError: the model routes tokens, shares keys and values, or has experts.
    """
    require_unrollable(config)
    plain = replace(config, recursion=None)
    theirs = [name for name, _ in unrolled_layers(plain)]
    sources: dict[str, tuple[str, _Delta | None]] = {"embedding.weight": ("embedding.weight", None)}
    for depth, (ours, step) in enumerate(unrolled_layers(config)):
        own, relaxation = layer_names(config, ours, "", step), None
        if ours.startswith("recursions."):
            relaxation = recursion_of(config, ours).relaxation
        for name, source in zip(layer_names(plain, theirs[depth], ""), own, strict=True):
            module, _, kind = source.rpartition(".")
            relaxed = () if relaxation is None else relaxation.projections
            has_delta = kind == "weight" and module.rpartition(".")[2] in relaxed
            sources[name] = source, (f"{module}.deltas.{step}", relaxation) if has_delta else None
    sources["norm.weights.0"] = "norm.weights.0", None
    if not config.tie_embeddings:
        sources["output.weight"] = "output.weight", None

    def make(name: str) -> Tensor:
        source, merged = sources[name]
        if merged is None:
            return weights[source]
        delta, relaxation = merged
        magnitude = weights[f"{delta}.magnitude"] if relaxation.kind == "dora" else None
        a, b = weights[f"{delta}.a"], weights[f"{delta}.b"]
        return merged_weight(weights[source], a, b, relaxation.scale, magnitude)

    return plain, LazyTensors(list(sources), make)
