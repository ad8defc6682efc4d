"""Norms of what attention and MLP give, before the residual adds it.

Legend: `p` rows of a step on this rank, `b` batch, `h` hidden.
"""

from collections.abc import Callable
from typing import Any, cast

from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from mor_megatron.norms import Norm

Build = Callable[[], nn.Module]


def attach_output_norms(layer: Any, build: Build) -> None:
    """Give a built layer's attention and MLP a norm of their outputs, `[p b h]`.

    Biases that Megatron would add with the residual are added before the norm.
    """

    def normed(module: Any, inputs: Any, output: tuple[Tensor, Tensor | None]) -> Any:
        own, bias = output
        return module.output_norm(own if bias is None else own + bias), None

    for module in (layer.self_attention, layer.mlp):
        if not isinstance(module, IdentityOp):  # a hybrid layer may have one of both
            module.output_norm = build()
            module.register_forward_hook(normed)


def like_norms_of(spec: ModuleSpec, config: TransformerConfig) -> Build:
    """Builds a norm as the layer has before attention or MLP.

    Where both are fused into the next linear layer, it is one of the same library that stands alone.
    """
    parts = cast(Any, spec.submodules)
    own = (n for n in (parts.input_layernorm, parts.pre_mlp_layernorm) if n is not IdentityOp)
    kind = next(own, TENorm if HAVE_TE else Norm)
    return lambda: kind(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
