"""Checks of our Triton kernels and of FlexAttention on one GPU, each against plain PyTorch.

In a rehearsal Triton's kernels run in its interpreter, and FlexAttention as PyTorch defines it.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from mor_layers import DecoderConfig, MoRTransformer, RecursionConfig
from mor_layers.recursion import block_masks
from mor_layers.selection.fused import (
    RMSNormWeight,
    add_gated,
    capability,
    fuses,
    take_and_norm,
    without_fused_kernels,
)
from tests.distributed import megatron_setup as setup

Results = dict[str, Tensor]


def rows_equal_plain(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Both kernels of selected rows, forward and backward, twice: they are deterministic.

    Args:
        shape: `n`, `b`, `k`, `h`.
    """
    setup.initialize()
    n, b, k, h = shape
    torch.manual_seed(0)
    rows = torch.stack([torch.randperm(n)[:k].sort().values for _ in range(b)], dim=1)
    given = {
        "values": torch.randn(n, b, h).to(dtype),
        "output": torch.randn(k, b, h).to(dtype),
        "weight": (1 + 0.3 * torch.randn(h)).to(dtype),
        "gates": torch.rand(k, b),
    }
    rows, given = rows.to(setup.device()), {k: v.to(setup.device()) for k, v in given.items()}
    is_padding = torch.rand(k, b).to(rows.device) < 0.1

    def run() -> Results:
        leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
        norm = RMSNormWeight(leaves["weight"], 1e-5)
        selected, normed = take_and_norm(leaves["values"], rows, norm)
        output = leaves["output"] + normed + 0.5 * selected
        result = add_gated(leaves["values"], output, leaves["gates"], rows, is_padding)
        result.float().square().mean().backward()
        results = {"selected": selected, "normed": normed, "result": result}
        return results | {f"gradient of {name}": x.grad for name, x in leaves.items()}  # type: ignore[misc]

    with _on_this_machine():
        assert fuses(given["values"], rows), "the kernels do not apply here"
        found, again = run(), run()
    with without_fused_kernels():
        expected = run()
    assert all(found[name].equal(again[name]) for name in found), "two runs differ"
    assert found["selected"].equal(expected["selected"])
    worst = {name: _relative(found[name], expected[name]) for name in found}
    limit = 1e-5 if dtype == torch.float32 else 2**-5  # some roundings to 8 bits in a row
    for name, error in worst.items():
        assert error < limit, f"{name} differs by {error:.2e}"
    return {"largest relative difference": max(worst.values())}


def model_equals_plain(
    recursion: RecursionConfig, length: int, hidden_size: int, is_compiled: bool = False
) -> dict[str, Any]:
    """Loss and gradients in fp32 of a model that uses all kernels, and of one that uses none."""
    setup.initialize()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    config = DecoderConfig(
        64, hidden_size, 2 * hidden_size, num_unrolled_layers=8, num_heads=2, recursion=recursion
    )
    model = MoRTransformer(config).to(setup.device())
    ids = torch.randint(64, (2, length)).to(setup.device())

    def run(model: Callable[..., Any]) -> Results:
        for parameter in parameters.values():
            parameter.grad = None
        loss = model(ids, labels=ids).loss
        loss.backward()
        return {"loss": loss.detach()} | {
            name: p.grad.clone() for name, p in parameters.items() if p.grad is not None
        }

    parameters = dict(model.named_parameters())
    with _on_this_machine():
        # Inductor has no backward pass of FlexAttention for CPUs.
        backend = "inductor" if torch.cuda.is_available() else "eager"
        fast = torch.compile(model, fullgraph=True, backend=backend) if is_compiled else model
        found = run(fast)
    with without_fused_kernels():
        expected = run(model)
    assert found.keys() == expected.keys()
    worst = max((_relative(found[k], expected[k]), k) for k in found)
    assert worst[0] < 1e-4, f"{worst[1]} differs by {worst[0]:.2e}"
    return {"largest relative difference": worst[0]}


def _relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    found, expected = found.detach().float(), expected.detach().float()
    scale = expected.abs().max().clamp(min=1e-8)
    return ((found - expected).abs().max() / scale).item()


@contextmanager
def _on_this_machine() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    with (
        warnings.catch_warnings(),
        patch.object(capability, "runs_kernels", lambda device: True),
        patch.object(block_masks, "runs_flex_attention", lambda device: True),
        patch.object(flex_attention, "_validate_device", lambda *tensors: None),
    ):
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield
