"""Compiling: a function of tensors as one graph with symbolic sizes, and what cannot become one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as config

from mor_layers.models import DecoderStack, MoRTransformer

Backend = str | Callable[..., Any]
"""A backend of `torch.compile`, or its name."""


class Compiled[**P, R]:
    """A function of tensors as a graph without a break, for any number of rows of at least 2.

    It is compiled when it is first called, and again when it is called after `forget`. What it reads
    besides its arguments is not watched, because watching takes longer than some layers. Numbers are
    constants of the graph, and so are all sizes but those of rows.

    Args:
        run: the function.
        backend: of `torch.compile`.
        rows: from the arguments to the tensors that have rows, with the dimension of these.

    Raises:
        ValueError: there is no such backend.
    """

    def __init__(
        self,
        run: Callable[P, R],
        backend: Backend,
        rows: Callable[P, list[tuple[Tensor, int]]],
    ) -> None:
        if isinstance(backend, str) and backend not in torch.compiler.list_backends(()):
            usual = ", ".join(map(repr, torch.compiler.list_backends()))
            raise ValueError(f"compiler={backend!r} is no backend of torch.compile. Use {usual}.")
        self._run, self._backend, self._rows = run, backend, rows
        self.forget()

    def forget(self) -> None:
        """Compile anew, because the function is another one now."""

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            return self._run(*args, **kwargs)

        # Graphs belong to code objects. This one is nobody else's, so that no graph of another function
        # is taken for one of this.
        run.__code__ = run.__code__.replace()
        options = None
        if hasattr(torch.compiler, "keep_tensor_guards_unsafe"):  # PyTorch lets guards be chosen
            options = {"guard_filter_fn": _guards_of_sizes}
        self._graph = torch.compile(run, fullgraph=True, backend=self._backend, options=options)
        self._is_compiled = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._is_compiled:
            return self._graph(*args, **kwargs)
        for tensor, dimension in self._rows(*args, **kwargs):
            torch._dynamo.mark_dynamic(tensor, dimension)
        with config.patch(use_duck_shape=False):  # sizes that happen to be equal may differ later
            result = self._graph(*args, **kwargs)
        self._is_compiled = True
        return result


def _guards_of_sizes(guards: Sequence[Any]) -> list[bool]:
    """Keep what a compiler assumes about sizes, which a test counts to hold for all of them."""
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]


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
