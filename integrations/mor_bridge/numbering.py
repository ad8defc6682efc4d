"""Corrects how Megatron-Bridge 0.6 numbers the layers of a pipeline stage.

A stage numbers its layers from 0, whereas a mapping needs a layer's number in the whole model.
Megatron-Bridge replaces every `layers.N.` in a parameter's name, also that of the layers inside a
recursion, so that on a stage that begins with layer 1

    decoder.layers.0.recursion.layers.0.mlp...  becomes  decoder.layers.1.recursion.layers.1.mlp...

instead of `decoder.layers.1.recursion.layers.0.mlp...`. Layers inside a recursion are numbered within
it, on every stage alike. The names of experts are renumbered in the whole name, as Megatron-Bridge does.
"""

import functools
from typing import Any

from megatron.bridge.models.conversion import model_bridge

_INSIDE, _HIDDEN = ".recursion.layers.", ".recursion.steps."


@functools.cache
def number_outer_layers_only() -> None:
    """Keep Megatron-Bridge from renumbering layers inside a recursion. Other names are not affected."""
    original = model_bridge._megatron_local_name_to_global

    def to_global(models: Any, config: Any, param_name: str, vp_stage: int | None = None) -> str:
        if _INSIDE not in param_name:
            return original(models, config, param_name, vp_stage)
        # Under this name no `layers.N.` is found behind that of the outer layer.
        hidden = param_name.replace(_INSIDE, _HIDDEN, 1)
        return original(models, config, hidden, vp_stage).replace(_HIDDEN, _INSIDE, 1)

    model_bridge._megatron_local_name_to_global = to_global
