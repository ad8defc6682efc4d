"""Where fused kernels apply."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_ROW = 65536
"""Bytes of a row that one program of a kernel holds in its registers."""
_is_allowed = True


def fuses(values: Tensor, *others: Tensor | None) -> bool:
    """Whether Triton kernels compute with rows like these.

    They do on a GPU with Triton installed, in eager mode. `torch.compile` fuses plain PyTorch by itself,
    so what it traces is always that. Subclasses of tensors, such as the shards of FSDP, are left to
    PyTorch. All kernels are deterministic, so it does not matter whether deterministic algorithms are
    asked for.

    Args:
        values: rows of hidden states.
        others: further tensors that a kernel would read. Those that hold rows too, which are those of
            as many dimensions, must have the dtype of `values`.
    """
    if torch.compiler.is_compiling() or not _is_allowed or not runs_kernels(values.device):
        return False
    if values.dtype not in _DTYPES or values.shape[-1] * values.element_size() > _LARGEST_ROW:
        return False
    given = [values, *(other for other in others if other is not None)]
    alike = all(tensor.dtype == values.dtype for tensor in given if tensor.dim() == values.dim())
    return alike and all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.device == values.device
        for tensor in given
    )


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton compiles for a device. Tests replace this function to use its interpreter."""
    return device.type == "cuda" and _has_triton()


def are_fused_kernels_allowed() -> bool:
    """False within `without_fused_kernels`."""
    return _is_allowed


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    """A context in which plain PyTorch computes everything, to compare or to find an error."""
    global _is_allowed
    before, _is_allowed = _is_allowed, False
    try:
        yield
    finally:
        _is_allowed = before
