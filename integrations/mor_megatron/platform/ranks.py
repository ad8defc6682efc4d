"""What one rank does for all of them."""

from collections.abc import Callable
from typing import Any

import torch


def on_first_rank[T](action: Callable[[], T]) -> T:
    """The result of `action`, run on rank 0 alone, on every rank; its OSError or ValueError too."""
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        # What files and settings can cause; other errors are faults of the program and end the rank.
        try:
            outcome[0] = action()
        except (OSError, ValueError) as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
