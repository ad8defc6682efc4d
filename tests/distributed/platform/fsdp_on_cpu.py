"""Megatron-FSDP on CPUs, for tests. Line numbers refer to megatron-core 0.19.2.

`platform.cpu` does for Megatron-Core what this does for its FSDP; it has no place there, because nothing
of Megatron-FSDP is of use without GPUs but seeing that it computes what it should.
"""

import functools
from typing import Any

import torch
from megatron.core.distributed.fsdp import mcore_fsdp_adapter as adapter
from megatron.core.distributed.fsdp.src.megatron_fsdp import (
    megatron_fsdp,
    param_and_grad_buffer,
    uneven_dtensor,
    utils,
)
from torch import Tensor

from mor_megatron.platform import cpu


class _AnyDevice(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch.device)


class _Device(metaclass=_AnyDevice):
    """`torch.device` for which `cuda:0` is the CPU (megatron_fsdp.py:232, mcore_fsdp_adapter.py:147)."""

    def __new__(cls, name: Any, *index: Any) -> torch.device:  # type: ignore[misc]
        return torch.device("cpu") if "cuda" in str(name) else torch.device(name, *index)


class _TorchOfACPU:
    device = _Device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@functools.cache
def enable() -> None:
    """Make Megatron-FSDP run in this process, after `platform.cpu.enable()`."""
    for module in (adapter, megatron_fsdp, param_and_grad_buffer, utils, uneven_dtensor):
        cpu.rewrite_literals(module)
        for member in list(vars(module).values()):
            if isinstance(member, type) and member.__module__ == module.__name__:
                cpu.rewrite_literals(member)
        vars(module)["torch"] = _TorchOfACPU()
    # gloo has no PREMUL_SUM (param_and_grad_buffer.py:4748).
    param_and_grad_buffer.gradient_reduce_preprocessing = _scaled
    # It would reshape a table of ranks by einops, which tests do not have (mcore_fsdp_adapter.py:561).
    adapter._get_dp_tp_mesh = _mesh
    torch.cuda.empty_cache = lambda: None


def _scaled(gradient: Tensor, factor: float | None, config: Any) -> Any:
    if factor is not None:
        gradient.mul_(factor)
    return torch.distributed.ReduceOp.SUM


def _mesh(data: Any, tensor: Any, ep_size: int = 1) -> Tensor:
    assert ep_size == 1, "only laid out for data and tensor parallelism"
    return torch.arange(torch.distributed.get_world_size()).reshape(data.size(), tensor.size())
