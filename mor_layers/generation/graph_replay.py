"""Replay: a function of tensors as CUDA graphs, one for each combination of shapes.

A graph replays what the device did, with the same memory, and without the host's part. Tensors that the
function reads besides its arguments, such as weights and caches, must therefore stay where they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    arguments: tuple[Tensor, ...]
    """Where the graph reads its arguments."""
    output: Tensor
    """Where it leaves its result."""


class Replay:
    """Records `run` for each combination of shapes when it first occurs, and replays it afterwards.

    Args:
        run: a function of tensors on the GPU. Running it twice with the same arguments must have the
            same effect as running it once.
    """

    def __init__(self, run: Callable[..., Tensor]) -> None:
        self._run = run
        self._recorded: dict[tuple[torch.Size, ...], _Recorded] = {}
        self._memory = torch.cuda.graph_pool_handle()

    @property
    def num_recorded(self) -> int:
        """Number of graphs."""
        return len(self._recorded)

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The result, which is valid until the next call."""
        shapes = tuple(argument.shape for argument in arguments)
        recorded = self._recorded.get(shapes)
        if recorded is None:
            recorded = self._recorded[shapes] = self._record(arguments)
        for own, given in zip(recorded.arguments, arguments, strict=True):
            own.copy_(given)
        recorded.graph.replay()
        return recorded.output

    def forget(self) -> None:
        """Record anew, because memory that the graphs read has moved."""
        self._recorded.clear()

    def _record(self, arguments: tuple[Tensor, ...]) -> _Recorded:
        own = tuple(argument.clone() for argument in arguments)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # compiles, and lets libraries allocate their workspaces
            self._run(*own)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            output = self._run(*own)
        return _Recorded(graph, own, output)
