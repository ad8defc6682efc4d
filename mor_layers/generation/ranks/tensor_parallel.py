"""Tensor parallelism for generation: each rank has a part of the heads and of every MLP's width.

    model = shard(MoRTransformer(config), group)
    engine = LockstepEngine(model, cache, group=group)

Every rank holds the embedding, the routers and the norms, computes the same hidden states, and
therefore makes the same decisions. The parts of the ranks are summed after attention and after the MLP.
Each rank caches the keys and values of its own heads. This is for inference only: the sums have no
gradient.

Source: Shoeybi et al. 2019 (arXiv 1909.08053), section 3.

Legend: `n` query heads, `g` key-value heads, `d` head size, `f` MLP width, `h` hidden, `e` experts.
"""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mor_layers.layers import (
    MoE,
    Projected,
    RelaxedLinear,
    StepDelta,
    StepLinear,
    norms_over_ranks,
    weights_of,
)
from mor_layers.models import DecoderLayer, MoRTransformer


def shard(model: MoRTransformer, group: ProcessGroup) -> MoRTransformer:
    """Keep this rank's part of every layer, in place.

    Args:
        model: the whole model, the same on every rank.

    Raises:
        ValueError: heads or widths are not divisible by the number of ranks.
    """
    size = group.size()
    sizes = {"num_heads": model.config.num_heads, "num_kv_heads": model.config.kv_heads}
    layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
    for layer in layers:
        is_moe = isinstance(layer.mlp, MoE)
        width = layer.mlp.experts.gate.shape[1] if is_moe else len(weights_of(layer.mlp.gate)[0])
        sizes["width of an expert" if is_moe else "ffn_hidden_size"] = width
        if is_moe and layer.mlp.shared is not None:
            sizes["shared_ffn_hidden_size"] = layer.mlp.shared.gate.shape[1]
    for name, value in sizes.items():
        if value % size:
            raise ValueError(
                f"{name}={value} is not divisible by the {size} ranks. Use a number of ranks that "
                "divides it."
            )
    for layer in layers:
        attention, mlp = layer.attention, layer.mlp
        for linear in attention.column_parallel:
            _keep_projection(
                linear, 0, group
            )  # [nd h], [gd h]; of latent attention [nd q], [n(u+v) c]
        _keep_projection(attention.output, 1, group)  # [h nd]
        _sum_over_ranks(attention.output, group)
        if isinstance(mlp, MoE):
            for experts in filter(None, (mlp.experts, mlp.shared)):
                _keep(experts, "gate", 1, group)  # [e f h]
                _keep(experts, "up", 1, group)
                _keep(experts, "down", 2, group)  # [e h f]
                _sum_over_ranks(experts, group)
        else:
            _keep_projection(mlp.gate, 0, group)  # [f h]
            _keep_projection(mlp.up, 0, group)
            _keep_projection(mlp.down, 1, group)  # [h f]
            _sum_over_ranks(mlp.down, group)
    return model


def _keep_projection(linear: Projected, dim: int, group: ProcessGroup) -> None:
    """Keep this rank's outputs (0) or inputs (1) of a projection, at every step."""
    if isinstance(linear, StepLinear):
        for step in range(len(linear.weights)):
            _keep(linear.weights, str(step), dim, group)
        for step in range(len(linear.biases)):
            _keep(linear.biases, str(step), 0, group)
        return
    _keep(linear, "weight", dim, group)
    if linear.bias is not None:
        _keep(linear, "bias", 0, group)
    _keep_deltas(linear, dim, group)


def _keep(module: nn.Module, name: str, dim: int, group: ProcessGroup) -> None:
    whole = getattr(module, name).detach()
    own = whole.chunk(group.size(), dim)[group.rank()].clone()
    setattr(module, name, nn.Parameter(own, requires_grad=False))


class ColumnsOfDelta(StepDelta):
    """The part of a step's delta that belongs to this rank's columns of the weight.

    Args:
        whole: the delta, the same on every rank.
        group: the ranks that hold the columns.
    """

    def __init__(self, whole: StepDelta, group: ProcessGroup) -> None:
        nn.Module.__init__(self)  # StepDelta's would make parameters, which `whole` has
        self.scale, self.group = whole.scale, group
        self.a, self.b, self.magnitude = whole.a, whole.b, whole.magnitude
        _keep(self, "a", 1, group)

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        return norms_over_ranks(super().norms(weight), self.group)


def _keep_deltas(linear: nn.Linear, dim: int, group: ProcessGroup) -> None:
    """Keep this rank's rows (0) or columns (1) of every step's delta."""
    if not isinstance(linear, RelaxedLinear):
        return
    for step, delta in enumerate(linear.deltas):
        assert isinstance(delta, StepDelta)
        if dim == 1:
            linear.deltas[step] = ColumnsOfDelta(delta, group)
            continue
        _keep(delta, "b", 0, group)
        if delta.magnitude is not None:
            _keep(delta, "magnitude", 0, group)


def _sum_over_ranks(module: nn.Module, group: ProcessGroup) -> None:
    def summed(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        torch.distributed.all_reduce(output, group=group)
        return output

    module.register_forward_hook(summed)
