"""Replay: a function of tensors as CUDA graphs, one for each combination of shapes.

A graph replays what the device did, with the same memory, and without the host's part. Tensors that the
function reads or changes besides its arguments, such as weights and caches, must therefore stay where
they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Arguments = tuple[Any, ...]
"""Tensors, in tuples of tuples; None where there is none."""


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    arguments: list[Tensor]
    """Where the graph reads its arguments."""
    result: Any
    """Where it leaves its result."""


class Replay[R]:
    """Records `run` for each combination of shapes when it first occurs, and replays it afterwards.

    Args:
        run: a function of tensors on the GPU.
        without_effect: from arguments of `run` to others of the same shapes, with which it changes
            nothing. It runs with these once before it is recorded.
    """

    def __init__(
        self, run: Callable[..., R], without_effect: Callable[[Arguments], Arguments]
    ) -> None:
        self._run, self._without_effect = run, without_effect
        self._recorded: dict[tuple[torch.Size | None, ...], _Recorded] = {}
        self._memory = torch.cuda.graph_pool_handle()

    @property
    def num_recorded(self) -> int:
        """Number of graphs."""
        return len(self._recorded)

    def __call__(self, *arguments: Any) -> R:
        """The result, which is valid until the next call."""
        leaves, _ = tree_flatten(arguments)
        shapes = tuple(None if leaf is None else leaf.shape for leaf in leaves)
        recorded = self._recorded.get(shapes)
        if recorded is None:
            recorded = self._recorded[shapes] = self._record(arguments)
        for own, given in zip(recorded.arguments, leaves, strict=True):
            if given is not None:
                own.copy_(given)
        recorded.graph.replay()
        return recorded.result

    def forget(self) -> None:
        """Record anew, because memory that the graphs read has moved."""
        self._recorded.clear()

    def _record(self, arguments: Arguments) -> _Recorded:
        leaves, structure = tree_flatten(self._without_effect(arguments))
        own = [None if leaf is None else leaf.clone() for leaf in leaves]
        kept = tree_unflatten(own, structure)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # compiles, and lets libraries allocate their workspaces
            self._run(*kept)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            result = self._run(*kept)
        return _Recorded(graph, own, result)
