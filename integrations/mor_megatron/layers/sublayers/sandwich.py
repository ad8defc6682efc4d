"""Norms and scaling of the outputs of attention and MLP, before they are added to the residual.

Legend: `p` rows of a step on this rank, `b` batch, `h` hidden.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from mor_megatron.layers.sublayers.norms import Norm

Build = Callable[[], nn.Module]


def attach_output_norms(layer: Any, build: Build) -> None:
    """Add norms of the attention's and the MLP's outputs, `[p b h]`, to a layer that is already
    built.

    The norms are registered in the layer itself, because an MLP passes no tensor-parallel group on
    to its submodules when it is saved. Biases that Megatron would add together with the residual
    are added before the norm.
    """
    for name, module in (("attention", layer.self_attention), ("mlp", layer.mlp)):
        if not isinstance(module, IdentityOp):  # a hybrid layer may have only one of them
            norm = build()
            setattr(layer, f"{name}_output_norm", norm)
            module.register_forward_hook(partial(_normed, norm))


def scale_branches(layer: Any, factor: float) -> None:
    """Multiply the outputs of a layer's attention and MLP by `factor`, after their norms if there
    are any.
    """
    for module in (layer.self_attention, layer.mlp):
        if not isinstance(module, IdentityOp):
            module.register_forward_hook(partial(_scaled, factor))


def _scaled(factor: float, module: Any, inputs: Any, output: tuple[Tensor, Tensor | None]) -> Any:
    own, bias = output
    return own * factor, None if bias is None else bias * factor


def _normed(norm: nn.Module, module: Any, inputs: Any, output: tuple[Tensor, Tensor | None]) -> Any:
    own, bias = output
    return norm(own if bias is None else own + bias), None


def like_norms_of(spec: ModuleSpec, config: TransformerConfig) -> Build:
    """Return a function that builds a norm of the kind the layer has before attention or MLP.

    If the layer spec fuses both norms into the next linear layer, it is the same library's separate
    norm.
    """
    parts = cast(Any, spec.submodules)
    own = (n for n in (parts.input_layernorm, parts.pre_mlp_layernorm) if n is not IdentityOp)
    kind: Any = next(own, TENorm if HAVE_TE else Norm)
    return lambda: kind(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
