"""Kernels of rows against plain PyTorch, in the layouts that layers have."""

import pytest
import torch
from torch import Tensor

from mor_layers.cpu_kernels import applies, rms_norm, rotate, swiglu, without_cpu_kernels
from mor_layers.cpu_kernels.rows import _row_stride

pytestmark = pytest.mark.usefixtures("inference")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


def require_equal(found: Tensor, expected: Tensor) -> None:
    """Equal up to rounding. In bf16, kernels round once and PyTorch after each operation."""
    assert found.dtype == expected.dtype
    tolerance = 2e-6 if found.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 48, 1000])
def test_swiglu(width: int, dtype: torch.dtype) -> None:
    joined = 3 * torch.randn(70, 1, 2 * width).to(dtype)
    joined[0, 0, :4] = torch.tensor([200.0, -200.0, 0.0, float("nan")])
    gate, up = joined.split(width, dim=-1)
    assert applies(gate, up) and _row_stride(gate, 1) == 2 * width
    found = swiglu(gate, up)
    assert found[0, 0, 3].isnan() and not found.flatten()[4:].isnan().any()
    gate, up, found = gate[1:], up[1:], found[1:]
    require_equal(found, torch.nn.functional.silu(gate.float()).mul(up).to(dtype))
    with without_cpu_kernels():
        require_equal(found, swiglu(gate, up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [6, 64])
def test_rotate(size: int, dtype: torch.dtype) -> None:
    joined = torch.randn(9, 2, 5 * size).to(dtype)
    heads = joined[:, :, size : 4 * size].unflatten(-1, (3, size))  # others' heads before and after
    angles = torch.randn(9, 2, 1, size).to(dtype)
    cos, sin = angles.cos(), angles.sin()
    found = rotate(heads, cos, sin)
    with without_cpu_kernels():
        require_equal(found, rotate(heads, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, 960])
def test_rms_norm(size: int, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(3, 30, size + 1).to(dtype)[..., 1:], torch.randn(size).to(dtype)
    found = rms_norm(hidden, weight, 1e-5)
    with without_cpu_kernels():
        require_equal(found, rms_norm(hidden, weight, 1e-5))


def test_rows_that_are_not_evenly_spaced_are_left_to_pytorch() -> None:
    values = torch.randn(4, 6, 10)
    assert _row_stride(values[:, :5], 1) is None
    assert _row_stride(values.transpose(1, 2), 1) is None
    assert _row_stride(values[:, :1], 1) == 60
    assert _row_stride(values[:, :, None], 2) == 10
    other = torch.randn(4, 5, 10)
    torch.testing.assert_close(
        swiglu(values[:, :5], other), torch.nn.functional.silu(values[:, :5]) * other
    )
    assert swiglu(values, values[:1]).shape == values.shape  # broadcast


def test_kernels_compute_no_gradients() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        gate, up = torch.randn(2, 3, 8).requires_grad_().unbind()
        assert not applies(gate, up)
        assert swiglu(gate, up).requires_grad
        assert not applies(torch.randn(3, dtype=torch.float64))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_compute_the_same(num_threads: int) -> None:
    values, weight = torch.randn(300, 512), torch.randn(512)
    expected = rms_norm(values, weight, 1e-6), swiglu(values, values)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(rms_norm(values, weight, 1e-6), expected[0])
        assert torch.equal(swiglu(values, values), expected[1])
    finally:
        torch.set_num_threads(before)
