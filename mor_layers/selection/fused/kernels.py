"""The Triton kernels. This module imports Triton, so it is imported where a kernel is used.

One program computes one row, and holds all of it. Rows are numbered as they lie in memory: row `i` of
sequence `j` is `i · b + j`. All arithmetic is in fp32, with the roundings of plain PyTorch in between.

Legend: `b` batch, `n` candidates of a step, `k` tokens that run it, `h` hidden.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUM_PARTS = 256
"""In how many parts the gradient of a weight is summed. A constant, so that the order of additions does
not depend on the device; about two for each multiprocessor of a large GPU."""


@triton.jit
def _take_and_norm(
    values, rows, weight, selected, normed, scales, batch, width, epsilon, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64)
    source = tl.load(rows + place) * batch + place % batch
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.load(values + source * width + columns, mask=inside, other=0.0)
    tl.store(selected + place * width + columns, row, mask=inside)
    wide = row.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / width + epsilon)
    tl.store(scales + place, scale)
    rounded = (wide * scale).to(row.dtype).to(tl.float32)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    result = (rounded * factor).to(normed.dtype.element_ty)
    tl.store(normed + place * width + columns, result, mask=inside)


@triton.jit
def _take_and_norm_backward(
    selected, scales, rows, weight, of_selected, of_normed, of_values, parts, count, batch, width,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for row_number in range(part, count, tl.num_programs(0)):
        place = tl.full([], 0, tl.int64) + row_number
        row = tl.load(selected + place * width + columns, mask=inside, other=0.0)
        scale = tl.load(scales + place)
        unit = row.to(tl.float32) * scale
        gradient = tl.load(of_normed + place * width + columns, mask=inside, other=0.0)
        gradient = gradient.to(tl.float32)
        total += gradient * unit.to(row.dtype).to(tl.float32)
        of_unit = (gradient * factor).to(row.dtype).to(tl.float32)
        along = tl.sum(of_unit * unit, axis=0) / width
        result = scale * (of_unit - unit * along)
        if HAS_RESIDUAL:
            result = result.to(row.dtype).to(tl.float32)
            residual = tl.load(of_selected + place * width + columns, mask=inside, other=0.0)
            result += residual.to(tl.float32)
        target = tl.load(rows + place) * batch + place % batch
        result = result.to(of_values.dtype.element_ty)
        tl.store(of_values + target * width + columns, result, mask=inside)
    tl.store(parts + part.to(tl.int64) * width + columns, total, mask=inside)


@triton.jit
def _add_gated(
    values, output, gates, rows, is_padding, result, batch, width,
    HAS_ROWS: tl.constexpr, HAS_PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    target = place
    if HAS_ROWS:
        target = tl.load(rows + place) * batch + place % batch
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    added = tl.load(output + place * width + columns, mask=inside, other=0.0)
    gate = tl.load(gates + place).to(added.dtype).to(tl.float32)
    added = (added.to(tl.float32) * gate).to(added.dtype).to(tl.float32)
    row = tl.load(values + target * width + columns, mask=inside, other=0.0)
    updated = (row.to(tl.float32) + added).to(row.dtype)
    if HAS_PADDING:
        updated = tl.where(tl.load(is_padding + place) != 0, row, updated)
    tl.store(result + target * width + columns, updated, mask=inside)


@triton.jit
def _add_gated_backward(
    gradient, output, gates, rows, is_padding, of_output, of_gates, batch, width,
    HAS_ROWS: tl.constexpr, HAS_PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    source = place
    if HAS_ROWS:
        source = tl.load(rows + place) * batch + place % batch
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if HAS_PADDING:
        inside = inside & (tl.load(is_padding + place) == 0)
    arrived = tl.load(gradient + source * width + columns, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(output + place * width + columns, mask=inside, other=0.0)
    gate = tl.load(gates + place).to(added.dtype).to(tl.float32)
    of_gate = tl.sum(arrived * added.to(tl.float32), axis=0).to(of_gates.dtype.element_ty)
    tl.store(of_gates + place, of_gate)
    result = (arrived * gate).to(added.dtype)
    tl.store(of_output + place * width + columns, result, mask=columns < width)


def take_and_norm(
    values: Tensor, rows: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows `[k b h]`, their norms `[k b h]`, and what each was multiplied by, `[k b]` in fp32."""
    batch, width = values.shape[1:]
    selected = values.new_empty((*rows.shape, width))
    normed = torch.empty_like(selected, dtype=torch.promote_types(values.dtype, weight.dtype))
    scales = torch.empty(rows.shape, dtype=torch.float32, device=values.device)
    if rows.numel():
        arguments = values, rows, weight, selected, normed, scales, batch, width, epsilon
        _take_and_norm[(rows.numel(),)](*arguments, **_sizes(width))
    return selected, normed, scales


def take_and_norm_backward(
    num_candidates: int,
    selected: Tensor,
    scales: Tensor,
    rows: Tensor,
    weight: Tensor,
    of_selected: Tensor | None,
    of_normed: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of the values, `[n b h]`, and of the weight."""
    batch, width = selected.shape[1:]
    of_values = selected.new_zeros((num_candidates, batch, width))
    num_parts = max(1, min(rows.numel(), _NUM_PARTS))
    parts = torch.empty((num_parts, width), dtype=torch.float32, device=selected.device)
    residual = of_normed if of_selected is None else of_selected
    _take_and_norm_backward[(num_parts,)](
        selected, scales, rows, weight, residual, of_normed, of_values, parts, rows.numel(), batch,
        width, HAS_RESIDUAL=of_selected is not None, **_sizes(width),
    )  # fmt: skip
    return of_values, parts.sum(dim=0).to(weight.dtype)


def add_gated(
    values: Tensor,
    output: Tensor,
    gates: Tensor,
    rows: Tensor | None,
    is_padding: Tensor | None,
) -> Tensor:
    """The sum, `[n b h]`."""
    result = torch.empty_like(values) if rows is None else values.clone()
    if gates.numel():
        _add_gated[(gates.numel(),)](
            values, output, gates, gates if rows is None else rows,
            gates if is_padding is None else is_padding, result, *values.shape[1:],
            **_flags(rows, is_padding), **_sizes(values.shape[-1]),
        )  # fmt: skip
    return result


def add_gated_backward(
    gradient: Tensor,
    output: Tensor,
    gates: Tensor,
    rows: Tensor | None,
    is_padding: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the output, `[k b h]`, and of the gates, `[k b]`."""
    of_output, of_gates = torch.empty_like(output), torch.empty_like(gates)
    if gates.numel():
        _add_gated_backward[(gates.numel(),)](
            gradient, output, gates, gates if rows is None else rows,
            gates if is_padding is None else is_padding, of_output, of_gates, *output.shape[1:],
            **_flags(rows, is_padding), **_sizes(output.shape[-1]),
        )  # fmt: skip
    return of_output, of_gates


def _flags(rows: Tensor | None, is_padding: Tensor | None) -> dict[str, bool]:
    return {"HAS_ROWS": rows is not None, "HAS_PADDING": is_padding is not None}


def _sizes(width: int) -> dict[str, Any]:
    """The power of two that a row fits into, and how many warps work on it."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}
