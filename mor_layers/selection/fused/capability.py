"""Where fused kernels apply."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from mor_layers.selection.fused.trial import passes

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
    """Whether the kernels run on a device, which is tried once. Tests replace this function to use
    Triton's interpreter."""
    return device.type == "cuda" and _has_triton() and kernels_pass(device)


def are_fused_kernels_allowed() -> bool:
    """False within `without_fused_kernels`."""
    return _is_allowed


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def kernels_pass(device: torch.device) -> bool:
    """Whether the kernels compute on a device what plain PyTorch computes, on a few rows."""
    from mor_layers.selection.fused import gating, norm

    rows = torch.tensor([[0, 2], [3, 4]], device=device)
    numbers = torch.linspace(-1, 1, 5 * 2 * 64, device=device).view(5, 2, 64)
    weight, gates = numbers[0, 0] + 1, numbers[:2, :, 0].abs()

    def run(take: Callable[..., Any], add: Callable[..., Any]) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [t.clone().requires_grad_() for t in (numbers, weight, gates)]
            selected, normed = take(leaves[0], rows, norm.RMSNormWeight(leaves[1], 1e-5))
            updated = add(leaves[0], selected + normed, leaves[2], rows)
            return [updated, *torch.autograd.grad(updated.square().sum(), leaves)]

    def by_kernels() -> list[Tensor]:
        return run(
            lambda values, rows, norm_: norm.TakeAndNorm.apply(values, rows, *norm_),
            lambda *given: gating.AddGated.apply(*given, None),
        )

    def plainly() -> list[Tensor]:
        with without_fused_kernels():
            return run(norm.take_and_norm, gating.add_gated)

    return passes("The fused selection of rows", by_kernels, plainly)


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    """A context in which plain PyTorch computes everything, to compare or to find an error."""
    global _is_allowed
    before, _is_allowed = _is_allowed, False
    try:
        yield
    finally:
        _is_allowed = before
