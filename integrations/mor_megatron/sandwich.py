"""Norms of what attention and MLP give, before the residual adds it.

Legend: `p` rows of a step on this rank, `b` batch, `h` hidden.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def attach_output_norms(layer: Any, build: Callable[[], nn.Module]) -> None:
    """Give a built layer's attention and MLP a norm of their outputs, `[p b h]`.

    Biases that Megatron would add with the residual are added before the norm.
    """
    for module, last in (
        (layer.self_attention, layer.self_attention.linear_proj),
        (layer.mlp,) * 2,
    ):
        module.output_norm = build()

        def hook(_: Any, inputs: Any, output: tuple[Tensor, Tensor | None], module=module) -> Any:
            own, bias = output
            return module.output_norm(own if bias is None else own + bias), None

        last.register_forward_hook(hook)
