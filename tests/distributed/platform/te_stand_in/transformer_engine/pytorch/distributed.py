"""What Megatron takes from here when it is imported, and how it recomputes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute


class CudaRNGStatesTracker:
    """Megatron derives a class from it, which is not used here."""


@contextmanager
def activation_recompute_forward(**settings: bool) -> Iterator[None]:
    """Marks the two phases of a recomputed forward pass."""
    if settings.keys() - {"activation_recompute", "recompute_phase"}:
        raise TypeError(f"activation_recompute_forward({settings})")
    yield


def checkpoint(
    function: Callable[..., Any],
    *args: Tensor,
    distribute_saved_activations: bool,
    get_rng_state_tracker: Any,
    tp_group: Any,
    **arguments: Any,
) -> Any:
    if distribute_saved_activations:
        raise NotImplementedError("the stand-in runs on one rank")
    return recompute(function, *args, use_reentrant=False, **arguments)
