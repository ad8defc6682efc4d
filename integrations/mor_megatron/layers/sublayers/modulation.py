"""Modulation of the norms of a recursion's layers by step and state.

Legend: `p` rows of a step on this rank, `b` batch, `h` hidden.
"""

from functools import partial
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from mor_layers.layers import Modulator, NormModulation
from mor_megatron.layers.sublayers.step_aware import StepAware

_PLACES = {"input_layernorm": "self_attention", "pre_mlp_layernorm": "mlp"}


class StepModulator(StepAware, Modulator):
    """The modulation of a norm at the step that runs, held whole by every rank."""

    def __init__(self, config: TransformerConfig, modulation: NormModulation) -> None:
        super().__init__(config.hidden_size, modulation)
        for parameter in self.parameters():
            # Under sequence parallelism, finalize_model_grads must sum the gradients of all ranks.
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, normed: Tensor) -> Tensor:  # type: ignore[override]
        """`[p b h] -> [p b h]`."""
        return super().forward(normed, self.step)


def attach_modulation(layer: Any, modulation: NormModulation, config: TransformerConfig) -> None:
    """Modulate the outputs of a built layer's norms before attention and MLP.

    The modulation is registered in the layer itself, beside the norm, so that the norm keeps its names
    and may be any library's.

    Raises:
        ValueError: a norm is fused into the next linear layer.
    """
    for place, fed in _PLACES.items():
        norm = getattr(layer, place)
        if isinstance(getattr(layer, fed), IdentityOp):  # a hybrid layer may have only one of them
            continue
        if isinstance(norm, IdentityOp):
            raise ValueError(
                f"norm_modulation needs a separate norm at {place}; this layer spec fuses it into the "
                "next linear layer. Use a local layer spec, or leave it out."
            )
        own = StepModulator(config, modulation)
        own.to(next(norm.parameters()).device, config.params_dtype)
        setattr(layer, f"{place}_modulation", own)
        norm.register_forward_hook(partial(_modulated, own))


def _modulated(own: nn.Module, norm: Any, inputs: Any, output: Tensor) -> Tensor:
    return own(output)
