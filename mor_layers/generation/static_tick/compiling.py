"""Compiling: a function of tensors as one graph with symbolic sizes, and what cannot become one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as config

from mor_layers.models import DecoderStack, MoRTransformer

Backend = str | Callable[..., Any]
"""A backend of `torch.compile`, or its name."""


def compiled[**P, R](run: Callable[P, R], backend: Backend) -> Callable[P, R]:
    """The function as a graph without a break, compiled once for all sizes of at least 2."""
    graph = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with config.patch(use_duck_shape=False):  # sizes that happen to be equal may differ later
            return graph(*args, **kwargs)

    return call


def obstacle(model: MoRTransformer) -> str | None:
    """Why a tick of the model cannot be one graph, if it cannot."""
    stacks = [model.prelude, *(block.layers for block in model.recursions), model.coda]
    for stack in stacks:
        assert isinstance(stack, nn.Module)
        if not isinstance(stack, DecoderStack):
            return f"its layers are a {type(stack).__name__}"
        if any(module._forward_hooks for module in stack.modules()):
            return "its modules have hooks, such as sums over ranks"
    return None
