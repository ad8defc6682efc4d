"""What the host reads about a tick that ran as a graph, while the next one may run already.

Legend: `t` sequences that leave, `h` hidden, `v` vocabulary, `n` numbers of a report.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mor_layers.generation.tick.graph.tick import Ticked


@dataclass(frozen=True)
class LeftTick:
    """What a tick leaves to the host."""

    num_running: int
    """Tokens that stay in flight."""
    num_free: list[int]
    """Free pages of the layers that run once, and of the recursion."""
    slots: list[int]
    """Sequences of one token in flight that have run all layers."""
    depths: list[int]
    """Of their tokens."""
    tokens: list[int]
    """Their next tokens; `NOT_CHOSEN` where the host chooses."""
    goes_on: list[bool]
    """Which of them follow in the next tick."""
    ended: Float[Tensor, "t h"]
    """States of their tokens."""
    logits: Float[Tensor, "t v"] | None
    left: list[int]
    """By slot, the number of tokens that have not exited yet."""


class Started:
    """A tick whose report has not been read.

    Args:
        ticked: what it returned. On a GPU, it may not have been computed yet.
        most_rows: rows of each kind that it writes to the cache, at most.
        is_recorded: whether the next tick writes its results to the same memory.
    """

    def __init__(self, ticked: Ticked, most_rows: int, is_recorded: bool) -> None:
        self.most_rows = most_rows
        self._report, self._is_copied = ticked.report, None
        self._ended, self._logits = ticked.ended, ticked.logits
        if is_recorded:
            self._ended = self._ended.clone()
            self._logits = None if self._logits is None else self._logits.clone()
        if ticked.report.is_cuda:
            self._report = torch.empty_like(ticked.report, device="cpu", pin_memory=True)
            self._report.copy_(ticked.report, non_blocking=True)
            self._is_copied = torch.cuda.Event()
            self._is_copied.record()

    def read(self, spare_slot: int) -> LeftTick:
        """Wait for the report, and read it.

        Args:
            spare_slot: in place of a slot where no sequence leaves.
        """
        if self._is_copied is not None:
            self._is_copied.synchronize()
        num_running, *num_free = (report := self._report.tolist())[:3]
        size = len(self._ended)
        columns = [report[start : start + size] for start in range(3, 3 + 4 * size, size)]
        slots, depths, tokens, goes_on = columns
        count = sum(slot != spare_slot for slot in slots)  # they come first
        return LeftTick(
            num_running,
            num_free,
            slots[:count],
            depths[:count],
            tokens[:count],
            [bool(follows) for follows in goes_on[:count]],
            self._ended[:count],
            None if self._logits is None else self._logits[:count],
            report[3 + 4 * size :],
        )
