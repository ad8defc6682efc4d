"""Tensor parallelism of a MoRTransformer: heads, widths and the vocabulary are divided over ranks.

Attention, an MLP and the experts of a layer are divided regions. The same states enter them on every
rank, each rank computes its part, and the parts are summed as they leave:

    forward    states  ->  part of this rank  ->  all-reduce  ->  states
    backward   all-reduce  <-  part of this rank  <-  gradients

The embedding and the projection to logits are divided by rows of the vocabulary: embeddings are summed
over ranks, logits are gathered. If the number of ranks does not divide the vocabulary, both stay whole.

Everything else is computed by every rank alike. So all ranks take the same decisions: which tokens run a
step, which experts they take, what later steps see.

Source: Shoeybi et al. 2019 (arXiv 1909.08053), section 3.

Legend: `b` batch, `s` sequence, `h` hidden, `n` query heads, `g` key-value heads, `d` head size, `f` MLP
width, `e` experts, `q` rank of a delta, `v` vocabulary, `w` this rank's part of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

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
from mor_layers.models.layers import ScaledEmbedding
from mor_titan.local_parameters import read_locally


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
    layouts: dict[Tensor, Layout] = {}
    for layer in (module for module in model.modules() if isinstance(module, DecoderLayer)):
        layouts |= dict(_layouts(layer))
        _divide_layer(layer, mesh)
    if model.config.vocab_size % mesh.size() == 0:
        layouts |= dict.fromkeys((model.embedding.weight, model.output.weight), divided(0))
        _divide_vocabulary(model, mesh)
    distributed: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
    for module in model.modules():
        gradients = {}
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            layout = layouts.get(parameter, WHOLE)
            if parameter not in distributed:
                # Every rank has the whole parameter, so no rank sends it to the others.
                part = distribute_tensor(parameter, mesh, [layout.parameter], src_data_rank=None)
                distributed[parameter] = nn.Parameter(part.detach(), parameter.requires_grad)
            module._parameters[name] = distributed[parameter]
            gradients[name] = layout.gradient
        if gradients:
            read_locally(module, gradients)


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
"""It is part of a divided region: each rank computes another part with it, and gradients add up."""


def divided(dim: int) -> Layout:
    """Each rank holds a part along a dimension, and computes the gradient of that part."""
    return Layout(Shard(dim), Shard(dim))


def _regions(layer: DecoderLayer) -> tuple[nn.Module, nn.Module]:
    """The divided regions. The router over experts is outside, so that it takes one decision."""
    return layer.attention, layer.mlp.experts if isinstance(layer.mlp, MoE) else layer.mlp


def _layouts(layer: DecoderLayer) -> Iterator[tuple[Tensor, Layout]]:
    """The layout of all parameters in divided regions; what comes later replaces what came before."""
    attention, mlp = layer.attention, layer.mlp
    for region in _regions(layer):
        yield from ((parameter, WHOLE_IN_REGION) for parameter in region.parameters())
    for linear in attention.column_parallel:
        yield from _of_columns(linear)  # [nd h], [gd h]; of latent attention [nd q], [n(u+v) c]
    yield from _of_rows(attention.output)  # [h nd]
    if isinstance(mlp, MoE):
        yield mlp.experts.gate, divided(1)  # [e f h]
        yield mlp.experts.up, divided(1)  # [e f h]
        yield mlp.experts.down, divided(2)  # [e h f]
    else:
        for linear in (mlp.gate, mlp.up):
            yield from _of_columns(linear)  # [f h]
        yield from _of_rows(mlp.down)  # [h f]


def _of_columns(linear: Projected) -> Iterator[tuple[Tensor, Layout]]:
    """A projection whose outputs are divided: `[o i]`, biases `[o]`, deltas `b [o q]`."""
    biases = linear.biases if isinstance(linear, StepLinear) else [linear.bias]
    parts = [*weights_of(linear), *biases]
    for delta in _deltas(linear):
        parts += [delta.b, delta.magnitude]
    yield from ((part, divided(0)) for part in parts if part is not None)


def _of_rows(linear: Projected) -> Iterator[tuple[Tensor, Layout]]:
    """A projection whose inputs are divided, without a bias: `[o i]`, deltas `a [q i]`."""
    parts = [*weights_of(linear), *(delta.a for delta in _deltas(linear))]
    yield from ((part, divided(1)) for part in parts)


def _deltas(linear: Projected | None) -> list[StepDelta]:
    return cast(list[StepDelta], [*linear.deltas]) if isinstance(linear, RelaxedLinear) else []


def _divide_layer(layer: DecoderLayer, mesh: DeviceMesh) -> None:
    """Make regions of a layer's attention and MLP, or experts."""

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states, second, *rest = arguments
        if isinstance(module, Experts):
            assignment = cast(Assignment, second)  # each rank's gates see its part of the outputs
            second = replace(assignment, gates=_entering(assignment.gates, mesh))
        return _entering(states, mesh), second, *rest

    for region in _regions(layer):
        region.register_forward_pre_hook(enter)
        region.register_forward_hook(lambda module, arguments, part: _summed(part, mesh))
    for linear in (layer.attention.output, getattr(layer.mlp, "down", None)):
        for delta in _deltas(linear):
            delta.__class__ = ColumnsOfDelta
            cast(ColumnsOfDelta, delta).group = mesh.get_group()


def _divide_vocabulary(model: MoRTransformer, mesh: DeviceMesh) -> None:
    """Divide the embedding and the projection to logits by rows."""
    model.embedding.__class__ = RowsOfEmbedding
    cast(RowsOfEmbedding, model.embedding).mesh = mesh
    model.output.register_forward_pre_hook(lambda module, states: (_entering(*states, mesh),))
    model.output.register_forward_hook(lambda module, states, part: _gathered(part, mesh))


class RowsOfEmbedding(ScaledEmbedding):
    """An embedding of which each rank of `mesh` has as many rows."""

    mesh: DeviceMesh

    def forward(self, ids: Int[Tensor, "s b"]) -> Float[Tensor, "s b h"]:  # type: ignore[override]
        rows = self.weight  # [w h]
        own = ids - self.mesh.get_local_rank() * len(rows)
        is_own = (own >= 0) & (own < len(rows))
        found = F.embedding(own.where(is_own, 0), rows)
        return _summed(found * is_own[..., None], self.mesh) * self.scale


class ColumnsOfDelta(StepDelta):
    """A step's delta of a projection whose inputs are divided over the ranks of `group`."""

    group: ProcessGroup

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        return norms_over_ranks(super().norms(weight), self.group)


def _entering(states: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same states, whose gradients are summed over ranks, each of which computes a part of them."""
    whole = DTensor.from_local(states, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def _summed(part: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over ranks, whose gradient is that of every part."""
    parts = DTensor.from_local(part, mesh, [Partial()], run_check=False)
    return parts.redistribute(placements=[Replicate()]).to_local()


def _gathered(part: Float[Tensor, "s b w"], mesh: DeviceMesh) -> Float[Tensor, "s b v"]:
    """The parts of all ranks, each of which gets the gradient of its own part."""
    parts = DTensor.from_local(part, mesh, [Shard(part.dim() - 1)], run_check=False)
    return parts.redistribute(placements=[Replicate()]).to_local()
