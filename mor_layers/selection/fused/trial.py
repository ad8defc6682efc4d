"""A trial of kernels on the machine at hand, before a model depends on them.

Kernels are compiled for the GPU, the driver and the version of Triton that are there, of which nobody
has tried all combinations. A model must not fail for want of a faster way to compute the same.
"""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def passes(
    what: str, found: Callable[[], Iterable[Tensor]], expected: Callable[[], Iterable[Tensor]]
) -> bool:
    """Whether kernels run, and compute what plain PyTorch computes. If not, a warning says why.

    Args:
        what: what the warning calls the kernels, in the singular.
        found: runs the kernels.
        expected: computes the same by plain PyTorch.
    """
    try:
        for ours, plain in zip(found(), expected(), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)
    except Exception as error:  # whatever a compiler raises
        logger.warning(
            "%s cannot be used here, and plain PyTorch takes its place: %s: %s",
            what,
            type(error).__name__,
            error,
        )
        return False
    return True
