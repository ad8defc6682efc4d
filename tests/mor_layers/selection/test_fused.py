"""The Triton kernels of selection against plain PyTorch, in Triton's interpreter or on a GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mor_layers import DecoderConfig, ExpertChoice, MoRTransformer, TokenChoice
from mor_layers.selection import fused
from mor_layers.selection.fused import RMSNormWeight, capability
from tests.mor_layers.small_models import random_ids, small_config, small_model

triton = pytest.importorskip("triton", reason="Triton is not installed")
interpreter = pytest.importorskip("triton.runtime.interpreter")
_convert_float = interpreter._convert_float
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(5, 2, 3, 8), (4, 1, 4, 1), (7, 3, 1, 33), (1, 2, 1, 130), (3, 2, 0, 5)]
"""`n`, `b`, `k`, `h`: a power of two, width 1 with all rows taken, odd sizes, more than one warp's
width, and no rows at all."""
HALF = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Twice the rounding error of each dtype, roughly."""


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch: Any) -> dict[str, int]:
    """Lets kernels run on this machine's device, and counts their calls."""
    from mor_layers.selection.fused import kernels

    monkeypatch.setattr(capability, "runs_kernels", lambda device: True)
    if DEVICE == "cpu":
        monkeypatch.setattr(interpreter, "_convert_float", rounded_as_on_gpus)
    calls: dict[str, int] = {}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return function(*args)

        return call

    for name in ("take_and_norm", "take_and_norm_backward", "add_gated", "add_gated_backward"):
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    return calls


def rounded_as_on_gpus(values: Any, from_type: Any, to_type: Any, mode: Any) -> Any:
    """Casts fp32 to bf16 by rounding to nearest even. Triton's interpreter cuts bits off instead."""
    if (from_type, to_type) != (triton.language.float32, triton.language.bfloat16):
        return _convert_float(values, from_type, to_type, mode)
    # A copy, because PyTorch would share the memory of an array that must not change.
    rounded = torch.from_numpy(values.view("float32").copy()).bfloat16()
    return rounded.view(torch.int16).numpy().view("uint16")


def some_rows(n: int, b: int, k: int) -> Tensor:
    """Different rows for each sequence, ascending."""
    return torch.stack([torch.randperm(n)[:k].sort().values for _ in range(b)], dim=1).to(DEVICE)


def compared(
    function: Callable[..., Any], inputs: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of kernels, and of plain PyTorch, with the same inputs and the same
    gradients of the results."""
    both = []
    for with_kernels in (True, False):
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        if with_kernels:
            results = function(*leaves)
        else:
            with fused.without_fused_kernels():
                results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        torch.manual_seed(1)
        arriving = [torch.randn(r.shape).to(r) for r in results]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(results, wanted, arriving)
        both.append([*(r.detach() for r in results), *gradients])
    return both[0], both[1]


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=HALF[dtype], atol=HALF[dtype] * scale)


@pytest.mark.parametrize("dtype", list(HALF))
@pytest.mark.parametrize(("n", "b", "k", "h"), SIZES)
def test_selected_rows_and_their_norms_are_plain_ones(
    kernels_run: dict[str, int], n: int, b: int, k: int, h: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    values, rows = torch.randn(n, b, h, device=DEVICE).to(dtype), some_rows(n, b, k)
    weight = (1 + 0.3 * torch.randn(h, device=DEVICE)).to(dtype)

    def run(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return fused.take_and_norm(values, rows, RMSNormWeight(weight, 1e-5))

    found, expected = compared(run, [values, weight])
    assert kernels_run == {"take_and_norm": 1, "take_and_norm_backward": 1}
    assert found[0].equal(expected[0])  # the copy
    for ours, plain in zip(found[1:3], expected[1:3], strict=True):
        assert_near(ours, plain, dtype)
    # Plain PyTorch rounds each product in the sum for the weight: in fp64 it would be nearer to ours.
    assert_near(found[3], expected[3], torch.bfloat16 if dtype != torch.float32 else dtype)
    is_left_out = torch.ones(n, b, dtype=torch.bool, device=DEVICE).scatter(0, rows, False)
    assert not found[2][is_left_out].any()


@pytest.mark.parametrize("dtype", list(HALF))
@pytest.mark.parametrize(("n", "b", "k", "h"), SIZES)
@pytest.mark.parametrize("kind", ["rows", "rows with padding", "all rows"])
def test_gated_output_is_added_as_plainly(
    kernels_run: dict[str, int], n: int, b: int, k: int, h: int, kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    k = n if kind == "all rows" else k
    rows = None if kind == "all rows" else some_rows(n, b, k)
    is_padding = torch.rand(k, b, device=DEVICE) < 0.5 if "padding" in kind else None
    values, output = (torch.randn(m, b, h, device=DEVICE).to(dtype) for m in (n, k))
    gates = torch.rand(k, b, device=DEVICE)  # fp32, as routers compute them

    def run(values: Tensor, output: Tensor, gates: Tensor) -> Tensor:
        return fused.add_gated(values, output, gates, rows, is_padding)

    found, expected = compared(run, [values, output, gates])
    assert kernels_run == {"add_gated": 1, "add_gated_backward": 1}
    for ours, plain in zip(found[:3], expected[:3], strict=True):
        if DEVICE == "cpu":  # a GPU may join a product and a sum and round once
            assert ours.equal(plain)
        assert_near(ours, plain, dtype)
    assert_near(found[3], expected[3], torch.bfloat16 if dtype != torch.float32 else dtype)


def test_a_sum_in_half_precision_is_nearer_to_the_exact_one_than_plainly() -> None:
    """The gradients of gates and norm weights, which plain PyTorch sums over rounded products."""
    torch.manual_seed(0)
    values, output = (torch.randn(16, 2, 257, device=DEVICE).bfloat16() for _ in range(2))
    gates, rows = torch.rand(9, 2, device=DEVICE), some_rows(16, 2, 9)
    output = output[:9]

    def run(values: Tensor, output: Tensor, gates: Tensor) -> Tensor:
        return fused.add_gated(values, output, gates, rows)

    found, plain = compared(run, [values, output, gates])
    _, exact = compared(run, [values.double(), output.double(), gates.double()])
    errors = [(x[3].double() - exact[3]).abs().mean() for x in (found, plain)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("unused", [0, 1])
def test_a_result_without_a_gradient_adds_none(unused: int) -> None:
    torch.manual_seed(0)
    rows, weight = some_rows(6, 2, 3), torch.rand(7, device=DEVICE)

    def run(values: Tensor, weight: Tensor) -> Tensor:
        return (
            fused.take_and_norm(values, rows, RMSNormWeight(weight, 1e-5))[1 - unused] + 0 * weight
        )

    found, expected = compared(run, [torch.randn(6, 2, 7, device=DEVICE), weight])
    for ours, plain in zip(found, expected, strict=True):
        assert_near(ours, plain, torch.float32)


def test_results_are_the_same_in_every_run() -> None:
    torch.manual_seed(0)
    rows = some_rows(40, 3, 30)
    norm = RMSNormWeight(torch.rand(65, device=DEVICE, requires_grad=True), 1e-5)
    values = torch.randn(40, 3, 65, device=DEVICE)
    gradients = [
        torch.autograd.grad(fused.take_and_norm(values, rows, norm)[1].square().sum(), norm.weight)
        for _ in range(2)
    ]
    assert gradients[0][0].equal(gradients[1][0])


def losses_and_gradients(model: MoRTransformer, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    output = model(ids, labels=ids)
    assert output.loss is not None
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [output.loss.detach(), *(g.clone() for g in gradients)]


ROUTED: dict[str, tuple[DecoderConfig, dict[str, int]]] = {
    # Steps 2 and 3 select. Each of three steps combines, the last one together with its write-back.
    "expert choice": (
        small_config(ExpertChoice(alpha=0.7)),
        {"take_and_norm": 2, "add_gated": 3},
    ),
    "own norms, sharing": (
        small_config(ExpertChoice(alpha=0.7), kv_policy="recursive_sharing", share_norms=False),
        {"take_and_norm": 2, "add_gated": 3},
    ),
    "exit state": (
        small_config(ExpertChoice(alpha=0.7), kv_policy="exit_state"),
        {"add_gated": 3},
    ),
    "another combination": (
        small_config(ExpertChoice(alpha=0.7, combine="additive")),
        {"take_and_norm": 2},
    ),
    "ragged": (small_config(TokenChoice()), {"take_and_norm": 2}),
}


@pytest.mark.parametrize("name", list(ROUTED))
def test_a_model_trains_as_without_kernels(kernels_run: dict[str, int], name: str) -> None:
    config, calls = ROUTED[name]
    model, ids = small_model(config).to(DEVICE).train(), random_ids(2, 9).to(DEVICE)
    found = losses_and_gradients(model, ids)
    both = dict(calls) | {f"{kernel}_backward": count for kernel, count in calls.items()}
    assert kernels_run == both
    with fused.without_fused_kernels():
        expected = losses_and_gradients(model, ids)
    assert kernels_run == both  # none without them
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_states_after_every_step_are_the_plain_ones() -> None:
    model = small_model(small_config(ExpertChoice(alpha=0.7))).to(DEVICE)
    hidden = torch.randn(9, 2, model.config.hidden_size, device=DEVICE)
    (block,) = model.recursions
    found = block(hidden, keeps_states=True)
    with fused.without_fused_kernels():
        expected = block(hidden, keeps_states=True)
    assert len(found.states) == len(found.decisions) == 3
    for ours, plain in zip(found.states, expected.states, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_a_compiled_graph_holds_plain_pytorch(kernels_run: dict[str, int]) -> None:
    rows, norm = some_rows(6, 2, 3), RMSNormWeight(torch.rand(4, device=DEVICE), 1e-5)

    def run(values: Tensor) -> Tensor:
        _, normed = fused.take_and_norm(values, rows, norm)
        return fused.add_gated(values, normed, normed[..., 0], rows)

    values = torch.randn(6, 2, 4, device=DEVICE)
    compiled = torch.compile(run, fullgraph=True, backend="eager")(values)
    assert kernels_run == {}
    torch.testing.assert_close(compiled, run(values))
    assert kernels_run == {"take_and_norm": 1, "add_gated": 1}


def test_what_kernels_cannot_hold_is_left_to_pytorch(monkeypatch: Any) -> None:
    rows = torch.zeros(2, 3, 4)
    assert fused.fuses(rows)
    assert not fused.fuses(rows.double())
    assert not fused.fuses(rows, rows.bfloat16())
    assert fused.fuses(rows, torch.zeros(4).bfloat16())  # the weight of a norm
    assert not fused.fuses(torch.zeros(1, 1, 1).expand(1, 1, 20000))
    assert not fused.fuses(torch.zeros(2, 3, 4, device="meta").as_subclass(Shard))
    monkeypatch.undo()
    assert fused.fuses(rows) == torch.get_default_device().type.startswith("cuda")


class Shard(Tensor):
    """What stands for a tensor that is not on this rank."""


def test_a_norm_that_is_modulated_stays_with_its_layer(kernels_run: dict[str, int]) -> None:
    from mor_layers.layers import NormModulation

    config = small_config(ExpertChoice())
    assert config.recursion is not None
    config = replace(config, recursion=replace(config.recursion, norm_modulation=NormModulation()))
    small_model(config).to(DEVICE)(random_ids(2, 9).to(DEVICE))
    assert "take_and_norm" not in kernels_run


def test_kernels_are_tried_before_they_are_used(
    kernels_run: dict[str, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mor_layers.selection.fused import kernels

    device = torch.device(DEVICE)
    try_now = (
        capability.kernels_pass.__wrapped__
    )  # what is kept from an earlier trial counts no more
    assert try_now(device) and set(kernels_run.values()) == {1} and not caplog.records
    backward = kernels.add_gated_backward

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        of_output, of_gates = backward(*arguments)
        return of_output, 2 * of_gates

    monkeypatch.setattr(kernels, "add_gated_backward", wrong)
    assert not try_now(device)
    assert "cannot be used here" in caplog.text and "Mismatched elements" in caplog.text

    def broken(*arguments: Any) -> None:
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr(kernels, "take_and_norm", broken)
    assert not try_now(device)
    assert "RuntimeError: no compiler was found" in caplog.text
