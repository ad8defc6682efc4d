"""Tensor parallelism of a MoRTransformer: heads, MLPs and experts are divided over the ranks of a group.

Attention, an MLP and the experts of a layer are divided regions. The same states enter them on every
rank, each rank computes its part, and the parts are summed as they leave:

    forward    states  ->  part of this rank  ->  all-reduce  ->  states
    backward   all-reduce  <-  part of this rank  <-  gradients

Everything else is computed by every rank alike, and therefore all ranks take the same decisions: which
tokens run a step, which experts they take, what is cached for later steps.

Every parameter is a DTensor over the group, as FSDP2, gradient clipping, the optimizer and checkpoints
expect. The modules of mor_layers read this rank's part of it as a plain tensor and know nothing of ranks.

Source: Shoeybi et al. 2019 (arXiv 1909.08053), section 3.

Legend: `n` query heads, `g` key-value heads, `d` head size, `f` MLP width, `h` hidden, `e` experts,
`q` rank of a delta.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import gcd
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from mor_layers import DecoderConfig, MoRTransformer
from mor_layers.layers import (
    Assignment,
    Experts,
    MoE,
    Projected,
    RelaxedLinear,
    StepDelta,
    StepLinear,
    norms_over_ranks,
    weights_of,
)
from mor_layers.models import DecoderLayer


def require_divisible(decoder: DecoderConfig, degree: int) -> None:
    """Raise ValueError if heads or widths of the model cannot be divided into `degree` equal parts."""
    sizes = {"num_heads": decoder.num_heads}
    if decoder.latent_attention is None:  # whose keys and values are heads only after projection
        sizes["num_kv_heads"] = decoder.kv_heads
    if decoder.moe is None or decoder.dense_ends:
        sizes["ffn_hidden_size"] = decoder.ffn_hidden_size
    if decoder.moe is not None:
        sizes["the width of an expert"] = decoder.moe.ffn_hidden_size or decoder.ffn_hidden_size
    largest = gcd(*sizes.values())
    if largest % degree == 0:
        return
    given = ", ".join(f"{name}={size}" for name, size in sizes.items())
    allowed = ", ".join(str(size) for size in range(1, largest + 1) if largest % size == 0)
    raise ValueError(
        f"parallelism.tensor_parallel_degree={degree} does not divide all of {given}. Use one of "
        f"{allowed}, or other sizes."
    )


def divide(model: MoRTransformer, mesh: DeviceMesh) -> None:
    """Divide the model over the ranks of a mesh with one dimension, in place. Call it before FSDP2.

    Args:
        model: the whole model, the same on every rank or on the meta device.
    """
    layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
    layouts: dict[nn.Parameter, Layout] = {}
    for layer in layers:
        layouts |= dict(_layouts(layer))
        for region in _regions(layer):
            _sum_over_ranks(region, mesh)
        outputs = [layer.attention.output, getattr(layer.mlp, "down", None)]
        for linear in (linear for linear in outputs if isinstance(linear, RelaxedLinear)):
            for delta in linear.deltas:
                delta.__class__ = ColumnsOfDelta
                cast(ColumnsOfDelta, delta).group = mesh.get_group()
    distributed: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
    for module in model.modules():
        gradients = {}
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            layout = layouts.get(parameter, WHOLE)
            if parameter not in distributed:
                part = distribute_tensor(
                    parameter.detach(), mesh, [layout.parameter], src_data_rank=None
                )
                distributed[parameter] = nn.Parameter(part, parameter.requires_grad)
            module._parameters[name] = distributed[parameter]
            gradients[name] = layout.gradient
        if gradients:
            _read_locally(module, gradients)


@dataclass(frozen=True)
class Layout:
    """Where the parts of a parameter are."""

    parameter: Placement
    """Which part of it a rank holds."""
    gradient: Placement
    """Which part of its gradient the rank's own backward pass computes."""


WHOLE = Layout(Replicate(), Replicate())
"""All ranks compute the same with it."""
WHOLE_IN_REGION = Layout(Replicate(), Partial())
"""It stands in a divided region, where ranks compute different things with it, whose gradients add up."""


def divided(dim: int) -> Layout:
    """Each rank holds a part along a dimension, and computes the gradient of that part."""
    return Layout(Shard(dim), Shard(dim))


def _regions(layer: DecoderLayer) -> tuple[nn.Module, nn.Module]:
    """The divided regions. The router over experts is outside, so that it takes one decision."""
    return layer.attention, layer.mlp.experts if isinstance(layer.mlp, MoE) else layer.mlp


def _layouts(layer: DecoderLayer) -> Iterator[tuple[nn.Parameter, Layout]]:
    """The layout of all parameters in divided regions; what comes later replaces what came before."""
    attention, mlp = layer.attention, layer.mlp
    for region in _regions(layer):
        yield from ((parameter, WHOLE_IN_REGION) for parameter in region.parameters())
    for linear in attention.column_parallel:
        yield from _of_columns(linear)  # [nd h], [gd h]; of latent attention [nd q], [n(u+v) c]
    yield from _of_rows(attention.output)  # [h nd]
    if isinstance(mlp, MoE):
        yield from ((weight, divided(1)) for weight in (mlp.experts.gate, mlp.experts.up))  # [e f h]
        yield mlp.experts.down, divided(2)  # [e h f]
    else:
        for linear in (mlp.gate, mlp.up):
            yield from _of_columns(linear)  # [f h]
        yield from _of_rows(mlp.down)  # [h f]


def _of_columns(linear: Projected) -> Iterator[tuple[nn.Parameter, Layout]]:
    """A projection whose outputs are divided: `[o i]`, biases `[o]`, deltas `b [o q]`."""
    biases = linear.biases if isinstance(linear, StepLinear) else [linear.bias]
    parts = [*weights_of(linear), *biases]
    for delta in _deltas(linear):
        parts += [delta.b, delta.magnitude]
    yield from ((cast(nn.Parameter, part), divided(0)) for part in parts if part is not None)


def _of_rows(linear: Projected) -> Iterator[tuple[nn.Parameter, Layout]]:
    """A projection whose inputs are divided, without a bias: `[o i]`, deltas `a [q i]`."""
    parts = [*weights_of(linear), *(delta.a for delta in _deltas(linear))]
    yield from ((cast(nn.Parameter, part), divided(1)) for part in parts)


def _deltas(linear: Projected) -> list[StepDelta]:
    return cast(list[StepDelta], [*linear.deltas]) if isinstance(linear, RelaxedLinear) else []


class ColumnsOfDelta(StepDelta):
    """A step's delta of a projection whose inputs are divided over the ranks of `group`."""

    group: ProcessGroup

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        return norms_over_ranks(super().norms(weight), self.group)


def _sum_over_ranks(region: nn.Module, mesh: DeviceMesh) -> None:
    """Sum the region's outputs over ranks and, in the backward pass, the gradients of its inputs."""

    def entering(states: Tensor) -> Tensor:
        whole = DTensor.from_local(states, mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states, second, *rest = arguments
        if isinstance(module, Experts):
            assignment = cast(Assignment, second)  # each rank's gates see its part of the outputs
            second = replace(assignment, gates=entering(assignment.gates))
        return entering(states), second, *rest

    def leave(module: nn.Module, arguments: tuple[Any, ...], part: Tensor) -> Tensor:
        parts = DTensor.from_local(part, mesh, [Partial()], run_check=False)
        return parts.redistribute(placements=[Replicate()]).to_local()

    region.register_forward_pre_hook(enter)
    region.register_forward_hook(leave)


def _read_locally(module: nn.Module, gradients: dict[str, Placement]) -> None:
    """Let a module read its DTensor parameters as this rank's plain tensors.

    `module.parameters()` and the state dict still have the DTensors, so that FSDP2 may replace them.

    Args:
        gradients: the placement of the gradient of each parameter, by name.
    """
    module.__class__ = _reader(type(module), tuple(gradients))
    object.__setattr__(module, "_gradient_placements", gradients)


@cache
def _reader(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of a module's class with a property for each parameter."""

    def reading(name: str) -> property:
        def local(module: Any) -> Tensor:
            parameter = module._parameters[name]
            if parameter.device_mesh.ndim > 1:  # a shard that FSDP2 has not gathered; it looks itself
                return parameter
            return parameter.to_local(grad_placements=[module._gradient_placements[name]])

        return property(local)

    return type(kind.__name__, (kind,), {name: reading(name) for name in names})
