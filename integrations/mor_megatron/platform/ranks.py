"""Actions that one rank runs on behalf of all ranks."""

from collections.abc import Callable
from typing import Any

import torch


def on_first_rank[T](action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank. Collective.

    If it raises OSError or ValueError, every rank raises the same error.
    """
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        # Wrong files and settings cause these errors. Any other error is a bug and ends the rank.
        try:
            outcome[0] = action()
        except (OSError, ValueError) as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
