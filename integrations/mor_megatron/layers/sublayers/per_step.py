"""Modules of which each step has its own: norms, attention, MLPs.

They are ordinary Megatron modules, one for each step, in the place of the one that steps share. Process
groups, sharding and checkpoints treat them like any others; only which of them runs is ours.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import nn

from mor_layers import RecursionConfig
from mor_layers.layers import Sublayer
from mor_megatron.layers.sublayers.step_aware import StepAware

_PLACES: dict[Sublayer, str] = {"attention": "self_attention", "mlp": "mlp"}
_NORMS: dict[Sublayer, str] = {"attention": "input_layernorm", "mlp": "pre_mlp_layernorm"}


class StepModules(StepAware, nn.ModuleList):
    """A module for each step, which is called as a single one is."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self[self.step](*inputs, **named)


class StepSublayers(StepModules):
    """A sublayer for each step, which knows itself how its tensors are sharded.

    Norms do not: Megatron takes them for replicated over the tensor-parallel group of the layer that
    contains them, which this class is not told.
    """

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Each step's tensors, cut as a single module's are."""
        state: dict[str, Any] = {}
        for step, module in enumerate(self):
            state |= sharded_state_dict_default(
                module, f"{prefix}{step}.", sharded_offsets, metadata
            )
        return state


def give_own_sublayers(
    layer: Any,
    spec: ModuleSpec,
    recursion: RecursionConfig,
    build: Callable[[ModuleSpec], TransformerLayer],
) -> None:
    """Give a built layer the further steps' sublayers, taken out of layers that are built for them.

    Args:
        layer: its own sublayers become those of step 1.
        spec: what the layer was built from.
        build: builds a layer at the same place.

    Raises:
        ValueError: a sublayer contains the norm before it, which all steps would have to share.
    """
    parts = cast(Any, spec.submodules)
    for name in recursion.own_per_step:
        place, norm = _PLACES[name], _NORMS[name]
        if getattr(parts, norm) is IdentityOp:
            raise ValueError(
                f"own_per_step={recursion.own_per_step} needs a norm of its own at {norm}; this layer "
                "spec fuses it into the next linear layer. Use a local layer spec."
            )
        others = {other: IdentityOp for other in _PLACES.values() if other != place}
        alone = replace(spec, submodules=replace(parts, **others))
        further = [getattr(build(alone), place) for _ in range(1, recursion.num_recursions)]
        setattr(layer, place, StepSublayers([getattr(layer, place), *further]))


def attentions_of(layer: Any) -> list[Any]:
    """A layer's attention, or that of each step."""
    attention = layer.self_attention
    return list(attention) if isinstance(attention, StepModules) else [attention]
