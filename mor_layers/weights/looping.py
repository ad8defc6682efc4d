"""A pretrained model whose middle layers run several times, without training and without new weights."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from mor_layers.models import DecoderConfig, RecursionConfig
from mor_layers.weights.folder import weight_names
from mor_layers.weights.names import unrolled_layers
from mor_layers.weights.tensor_files import LazyTensors


def looped_weights(
    weights: Mapping[str, Tensor], plain: DecoderConfig, recursion: RecursionConfig
) -> tuple[DecoderConfig, LazyTensors]:
    """The settings and weights of a model that repeats the layers between prelude and coda.

    Unlike in `recursive_weights`, no layer is left out: a model of L layers becomes one of
    `prelude + num_recursions · (L - prelude - coda) + coda` unrolled layers.

    Args:
        weights: tensors of the plain model, under the names of a MoRTransformer's state dict.
        plain: the settings of the plain model, which may have experts in all layers.
        recursion: how the layers repeat. `DampedLoops` is made for it.

    Raises:
        ValueError: the model has a recursion, no layer is left to repeat, or the recursion has weights
            that a plain model does not.
    """
    if plain.recursion is not None or plain.dense_ends:
        raise ValueError(
            "only a plain model can be looped, but this one has a recursion, or experts in only some of "
            "its layers. Use a model with recursion=None and dense_ends=False."
        )
    prelude, coda = recursion.ends
    size = plain.num_unrolled_layers - prelude - coda
    if size < 1:
        raise ValueError(
            f"prelude_layers={prelude} and coda_layers={coda} leave no layer to repeat of the model's "
            f"{plain.num_unrolled_layers}. Use fewer."
        )
    depth = prelude + size * recursion.num_recursions + coda
    config = replace(plain, recursion=recursion, num_unrolled_layers=depth)
    layers = list(dict.fromkeys(name for name, _ in unrolled_layers(config)))
    theirs = [name for name, _ in unrolled_layers(plain)]
    places = dict(zip(layers, theirs, strict=True))
    sources = {}
    for name in weight_names(config):
        layer = next((place for place in places if name.startswith(f"{place}.")), None)
        source = name if layer is None else name.replace(layer, places[layer], 1)
        if source not in weights:
            raise ValueError(
                f"{name!r} has no counterpart in the plain model: recursion={recursion} has weights of "
                "its own, which only training can set. Leave them out."
            )
        sources[name] = source
    return config, LazyTensors(list(sources), lambda name: weights[sources[name]])
