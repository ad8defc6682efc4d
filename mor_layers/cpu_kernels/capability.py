"""Where kernels apply."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mor_layers.cpu_kernels.build import library

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}
"""As the kernels count them."""
_is_allowed = True


def applies(values: Tensor, *others: Tensor) -> bool:
    """Whether kernels compute with rows like these.

    They do without gradients on a CPU, in single precision or bf16, where there is a C++ compiler.
    `torch.compile` fuses plain PyTorch by itself, so what it traces is always that. Subclasses of
    tensors are left to PyTorch.

    Args:
        values: rows of states.
        others: what a kernel would read besides, of the same dtype.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_allowed:
        return False
    if values.dtype not in (torch.float32, torch.bfloat16):
        return False
    return library() is not None and all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == values.dtype
        for tensor in (values, *others)
    )


def are_kernels_allowed() -> bool:
    """False within `without_cpu_kernels`."""
    return _is_allowed


@contextmanager
def without_cpu_kernels() -> Iterator[None]:
    """A context in which plain PyTorch computes everything, to compare or to find an error."""
    global _is_allowed
    before, _is_allowed = _is_allowed, False
    try:
        yield
    finally:
        _is_allowed = before
