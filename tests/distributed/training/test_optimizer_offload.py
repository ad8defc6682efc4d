"""Megatron's optimizer offload: a CPU updates shared weights, with the steps that a GPU would take."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from mor_layers import ExpertChoice, RecursionConfig, Relaxation
from mor_megatron import recursion_block_spec
from mor_megatron.checkpoints import runs
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool
from tests.gpu.layers import BF16

RECURSION = RecursionConfig(3, router=ExpertChoice(alpha=0.5), relaxation=Relaxation(4))


class _TorchWithoutPinning:
    """`torch` for a module that allocates pinned memory (hybrid_optimizer.py:102)."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name != "empty":
            return value
        return lambda *sizes, pin_memory=False, **options: value(*sizes, **options)


@contextmanager
def parameters_as_on_a_gpu() -> Iterator[None]:
    """Tensors say that they are on a GPU, unless they were pinned, or made from one that was.

    Only such parameters are offloaded (hybrid_optimizer.py:268), by `pin_memory` of a copy, and `float`.
    """
    pin, to_float = torch.Tensor.pin_memory, torch.Tensor.float

    def pinned(self: Tensor, *device: Any) -> Tensor:
        self.is_on_host = True  # type: ignore[attr-defined]
        return self

    def as_float(self: Tensor) -> Tensor:
        return pinned(to_float(self)) if hasattr(self, "is_on_host") else to_float(self)

    torch.Tensor.pin_memory, torch.Tensor.float = pinned, as_float  # type: ignore[method-assign]
    torch.Tensor.is_cuda = property(lambda self: not hasattr(self, "is_on_host"))  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.Tensor.pin_memory, torch.Tensor.float = pin, to_float  # type: ignore[method-assign]
        del torch.Tensor.is_cuda


def losses(fraction: float | None, is_bf16: bool, folder: str | None = None) -> list[float]:
    """Of some steps of training; the first checkpoint is tried where there is a folder for it.

    Args:
        fraction: of the parameters that the CPU updates. None: no offload.
        is_bf16: bf16 with the distributed optimizer, or fp32 without.
    """
    from megatron.core.optimizer.cpu_offloading import hybrid_optimizer

    setup.initialize()
    chunks = setup.tiny_gpt(
        setup.tiny_config(num_layers=8, **(BF16 if is_bf16 else {})),
        lambda c, v: recursion_block_spec(c, RECURSION, vp_stage=v),
    )
    wrapped = setup.data_parallel(chunks, use_distributed_optimizer=is_bf16)
    if fraction is None:
        optimizer = setup.build_optimizer(wrapped)
    else:
        hybrid_optimizer.torch = _TorchWithoutPinning()
        options = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
        with parameters_as_on_a_gpu():
            optimizer = setup.build_optimizer(wrapped, **options)
        (inner,) = [o.optimizer for o in getattr(optimizer, "chained_optimizers", [optimizer])]
        total = sum(p.numel() for group in inner.param_groups for p in group["params"])
        moved = sum(p.numel() for p in inner.gpu_params_map_cpu_copy)
        assert fraction <= moved / total <= fraction + 0.25
    found = [
        setup.train_step(wrapped, optimizer, setup.random_tokens(4, 16, seed), 2)
        for seed in range(4)
    ]
    if folder is not None:
        with pytest.raises(ValueError, match="state of HybridDeviceOptimizer"):
            runs.save(folder, 4, wrapped, optimizer)
    return found


@pytest.mark.parametrize(
    ("fraction", "is_bf16"),
    [
        (0.5, False),
        pytest.param(1.0, False, marks=pytest.mark.full),
        pytest.param(0.5, True, marks=pytest.mark.full),
        pytest.param(1.0, True, marks=pytest.mark.full),
    ],
)
def test_an_offloaded_optimizer_takes_the_same_steps(
    pool: WorkerPool, tmp_path: Any, fraction: float, is_bf16: bool
) -> None:
    (expected,) = pool.run(losses, fraction=None, is_bf16=is_bf16)
    (found,) = pool.run(losses, fraction=fraction, is_bf16=is_bf16, folder=str(tmp_path))
    assert found == expected
    assert len(set(expected)) == 4  # steps change the loss
