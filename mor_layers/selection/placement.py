"""Where the rows of hidden states are stored, and moving the selected rows out and back.

Legend: `b` batch, `n` candidates of a step, `k` tokens that run it, `h` hidden.
"""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from mor_layers.selection.decision import RoutingDecision
from mor_layers.selection.tokens import put_rows, take_rows


class Placement(Protocol):
    """Where the rows of hidden states are stored: all on this rank, or spread over ranks.

    A placement makes the main path of `RecursionBlock` parallel without a second implementation of it.
    Routers decide over the full sequence on every rank, while hidden states may be a shard of it.
    """

    def gather(self, logits: Float[Tensor, "shard b c"], count: int) -> Float[Tensor, "n b c"]:
        """Router logits of all `count` candidates, gathered from those of this rank's candidates."""
        ...

    def select(
        self, candidates: Float[Tensor, "shard b h"], decision: RoutingDecision
    ) -> Float[Tensor, "shard2 b h"]:
        """Hidden states of the selected tokens, distributed in the same way."""
        ...

    def shard(self, decision: RoutingDecision) -> RoutingDecision:
        """The part of a decision for the rows that `select` returns on this rank."""
        ...

    def write_back(
        self,
        candidates: Float[Tensor, "shard b h"],
        updated: Float[Tensor, "shard2 b h"],
        decision: RoutingDecision,
    ) -> Float[Tensor, "shard b h"]:
        """The candidates, with the new states of the selected tokens written back."""
        ...


class LocalPlacement:
    """All rows are on this rank."""

    def gather(self, logits: Tensor, count: int) -> Tensor:
        return logits

    def select(self, candidates: Tensor, decision: RoutingDecision) -> Tensor:
        return candidates if decision.rows is None else take_rows(candidates, decision.rows)

    def shard(self, decision: RoutingDecision) -> RoutingDecision:
        return decision

    def write_back(self, candidates: Tensor, updated: Tensor, decision: RoutingDecision) -> Tensor:
        return updated if decision.rows is None else put_rows(candidates, updated, decision.rows)
