"""Norms and factors of what attention and MLP give, before the residual adds it.

Legend: `p` rows of a step on this rank, `b` batch, `h` hidden.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from mor_megatron.layers.norms import Norm

Build = Callable[[], nn.Module]


def attach_output_norms(layer: Any, build: Build) -> None:
    """Give a built layer norms of its attention's and its MLP's outputs, `[p b h]`.

    They are the layer's and not theirs: what an MLP holds has no tensor-parallel group in checkpoints.
    Biases that Megatron would add with the residual are added before the norm.
    """
    for name, module in (("attention", layer.self_attention), ("mlp", layer.mlp)):
        if not isinstance(module, IdentityOp):  # a hybrid layer may have one of both
            norm = build()
            setattr(layer, f"{name}_output_norm", norm)
            module.register_forward_hook(partial(_normed, norm))


def scale_branches(layer: Any, factor: float) -> None:
    """Let a built layer multiply its attention's and its MLP's outputs; after norms, if it has any."""
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
    """Builds a norm as the layer has before attention or MLP.

    Where both are fused into the next linear layer, it is one of the same library that stands alone.
    """
    parts = cast(Any, spec.submodules)
    own = (n for n in (parts.input_layernorm, parts.pre_mlp_layernorm) if n is not IdentityOp)
    kind: Any = next(own, TENorm if HAVE_TE else Norm)
    return lambda: kind(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
