"""SpanExits: final states of exited tokens, until all tokens of their span have exited.

Legend: `t` tokens, `s` slots, `p` tokens of the longest span, `h` hidden.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor_layers.generation.tick.in_flight import Rows


class SpanExits:
    """What remains of tokens that have exited, by slot and place in the span.

    Args:
        num_slots: slots, each of which has at most one span in flight.
        max_span: largest number of tokens in a span.
        like: a tensor with the size (its last dimension), precision and device of states.
    """

    def __init__(self, num_slots: int, max_span: int, like: Float[Tensor, "... h"]) -> None:
        self.hidden = torch.zeros(
            num_slots, max_span, like.shape[-1], dtype=like.dtype, device=like.device
        )
        self.depths = torch.zeros(num_slots, max_span, dtype=torch.long, device=like.device)
        self.positions = torch.zeros_like(self.depths)
        self.left = torch.zeros(num_slots, dtype=torch.long, device=like.device)
        """Number of tokens of each span that have not exited yet."""

    def expect(self, slots: Int[Tensor, " t"], is_token: Bool[Tensor, " t"] | None = None) -> None:
        """Take note of tokens that enter.

        Args:
            is_token: which rows hold a token. Default: all.
        """
        count = torch.ones_like(slots) if is_token is None else is_token.long()
        self.left.index_add_(0, slots, count)

    def note(self, rows: Rows, is_exit: Bool[Tensor, " t"] | None = None) -> None:
        """Store the states and depths of tokens that exit.

        Args:
            is_exit: which rows hold such a token; the others are in the last slot, which is spare.
        """
        at = rows.slots, rows.places
        self.hidden.index_put_(at, rows.hidden)
        self.depths.index_put_(at, rows.steps)
        self.positions.index_put_(at, rows.positions)
        count = torch.ones_like(rows.slots) if is_exit is None else is_exit.long()
        self.left.index_add_(0, rows.slots, -count)

    def forget(self, slot: int) -> None:
        """Expect no more tokens of a slot."""
        self.left[slot] = 0
