"""StaticContext: what layers know about the rows of a graph.

Legend: `t` rows of a graph, `w` of them that may write to the cache, `b` = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mor_layers.generation.tick.graph.attention import Attend
from mor_layers.recursion import Exited, Products, StepContext


@dataclass(frozen=True)
class StaticContext(StepContext):
    """What layers know about rows, `[t 1 h]`, whose steps are values.

    Where a tick without a graph computes only what is chosen, a graph computes everything and selects:
    each row runs the projections of every step and, unless an operation runs the chosen ones, every
    expert.
    """

    step: Int[Tensor, "t 1"]  # type: ignore[assignment]
    num_steps: int
    cache: Attend
    """Attention to the rows that each token sees."""
    num_written: int
    """How many of the first rows may write to the cache."""
    exited: Exited | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    """Exited tokens whose rows are stored now, and padding, if the policy stores them."""
    projects_alike: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]
    products: Products | None = None  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def keeps_latent_rows(self) -> bool:
        return True

    @property
    def has_static_shapes(self) -> bool:
        return True

    def rows_to_project(self, hidden: Tensor) -> Tensor:
        return hidden[: self.num_written]

    def at_each_step(self, count: int, run: Callable[[int, slice], Tensor]) -> Tensor:
        # Every row runs every step, and the result of its own step remains.
        every = torch.stack([run(step, slice(0, count)) for step in range(self.num_steps)])
        own = self.step[None, :count, :, None].expand(1, *every.shape[1:])
        return every.gather(0, own)[0]

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        key = None if key is None else key[:, 0]
        value = None if value is None else value[:, 0]
        return self.cache(layer, query[:, 0], key, value)[:, None]
