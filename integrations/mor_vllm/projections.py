"""Projections of layers that run in several steps, on vLLM's linear layers.

They are those of `mor_layers.layers.projections`: shared by all steps, relaxed by a delta for each
step, or one for each step. Deltas are not merged into the weights, because then every step would
need a copy of these. Each delta is split over the ranks as its weight is, by the outputs of a
column-parallel projection or by the inputs of a row-parallel one, whose ranks then add their parts
of the shared weight and of the delta in a single all-reduce.

Legend: `t` tokens of a batch, from any requests; `i` inputs and `o` outputs on this rank, `q` rank of
a delta.
"""

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from vllm.distributed import (  # type: ignore[import-not-found]
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import (  # type: ignore[import-not-found]
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)

from mor_layers import DecoderConfig, Relaxation
from mor_layers.layers import Projection, row_norms

ROW_PARALLEL: tuple[Projection, ...] = ("output", "down")
"""Projections whose inputs, and not outputs, are split over the ranks."""


class StepProjection(nn.Module):
    """One projection, or several of the same input whose weights are one matrix.

    Args:
        names: the projections, which the settings of the recursion treat alike or relax one by one.
        into: number of inputs, on all ranks.
        outs: number of outputs of each projection, on all ranks.
        num_steps: number of steps that the layer runs in.
    """

    def __init__(
        self,
        names: Sequence[Projection],
        into: int,
        outs: Sequence[int],
        config: DecoderConfig,
        num_steps: int,
        bias: bool = False,
    ) -> None:
        super().__init__()
        recursion, ranks = config.effective_recursion, get_tensor_model_parallel_world_size()
        self.is_row_parallel = names[0] in ROW_PARALLEL
        relaxation = None if num_steps == 1 else recursion.relaxation
        relaxed = [n for n in names if relaxation is not None and n in relaxation.projections]
        # A relaxed projection reduces, and adds its bias, after its delta.
        settings = {"bias": bias, "skip_bias_add": bool(relaxed)}

        def linear() -> nn.Module:
            if self.is_row_parallel:
                return RowParallelLinear(into, *outs, **settings, reduce_results=not relaxed)
            if len(outs) == 1:
                return ColumnParallelLinear(into, *outs, **settings)
            return MergedColumnParallelLinear(into, list(outs), **settings)

        is_own = num_steps > 1 and names[0] in recursion.own_projections
        self.linears = nn.ModuleList(linear() for _ in range(num_steps if is_own else 1))
        self.names = tuple(names)
        self.sizes = [out if self.is_row_parallel else out // ranks for out in outs]
        self.deltas = nn.ModuleDict()
        for name, out in zip(names, outs, strict=True):
            if relaxation is not None and name in relaxed:
                self.deltas[name] = nn.ModuleList(
                    ShardedDelta(into, out, relaxation, self.is_row_parallel)
                    for _ in range(num_steps)
                )

    def forward(self, hidden: Float[Tensor, "t i"], step: int) -> Float[Tensor, "t o"]:
        linear = self.linears[step if len(self.linears) > 1 else 0]
        projected, bias = linear(hidden)
        if not len(self.deltas):
            return projected
        parts = [
            self._delta(name, step)(hidden, part) if name in self.deltas else part
            for name, part in zip(self.names, projected.split(self.sizes, dim=-1), strict=True)
        ]
        relaxed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if self.is_row_parallel:
            relaxed = tensor_model_parallel_all_reduce(relaxed)
        return relaxed if bias is None else relaxed + bias

    def settle(self) -> None:
        """Compute what depends on the weights alone, once they are loaded."""
        weights = self.linears[0].weight.split(self.sizes)  # type: ignore[operator, union-attr]
        for name, weight in zip(self.names, weights, strict=True):
            if name in self.deltas:
                for step in range(len(self.deltas[name])):  # type: ignore[arg-type]
                    self._delta(name, step).settle(weight)

    def _delta(self, name: str, step: int) -> "ShardedDelta":
        return self.deltas[name][step]  # type: ignore[index]


class ShardedDelta(nn.Module):
    """This rank's part of the delta of one step for one projection."""

    factor: Tensor

    def __init__(self, into: int, out: int, relaxation: Relaxation, is_row_parallel: bool) -> None:
        super().__init__()
        ranks, rank = get_tensor_model_parallel_world_size(), relaxation.rank_of(into, out)
        self.scale, self.is_row_parallel = relaxation.scale, is_row_parallel
        if is_row_parallel:
            self.a = sharded((rank, into // ranks), dim=1)
            self.b = sharded((out, rank))
        else:
            self.a = sharded((rank, into))
            self.b = sharded((out // ranks, rank), dim=0)
        self.magnitude = None
        if relaxation.kind == "dora":
            self.magnitude = sharded((len(self.b),), dim=None if is_row_parallel else 0)
            ones = torch.ones(len(self.b), dtype=torch.float32)
            self.register_buffer("factor", ones, persistent=False)

    def forward(
        self, hidden: Float[Tensor, "t i"], projected: Float[Tensor, "t o"]
    ) -> Float[Tensor, "t o"]:
        """This step's projection of `hidden`, given that of the shared weight.

        If it is row-parallel, both are this rank's parts of a sum over ranks.
        """
        relaxed = projected + self.scale * F.linear(F.linear(hidden, self.a), self.b)
        return relaxed if self.magnitude is None else relaxed * self.factor.to(relaxed.dtype)

    @torch.no_grad()
    def settle(self, weight: Float[Tensor, "o i"]) -> None:
        """Compute `dora`'s factor of each output, given this rank's part of the shared weight."""
        if self.magnitude is None:
            return
        norms = row_norms(weight, self.a, self.b, self.scale)
        if self.is_row_parallel:  # a rank has only part of each row
            norms = tensor_model_parallel_all_reduce(norms.square()).sqrt()
        self.factor.copy_(self.magnitude / norms)


def sharded(shape: Sequence[int], dim: int | None = None, own: int | None = None) -> nn.Parameter:
    """An empty parameter whose loader takes this rank's part of a whole tensor along `dim`.

    Args:
        shape: of this rank's part.
        dim: dimension that is split over the ranks; None: every rank has the whole tensor.
        own: length of the part in the whole tensor, if the parameter has room for more. The rest
            is 0.
    """
    parameter = nn.Parameter(torch.empty(*shape), requires_grad=False)
    parameter.weight_loader = _loader(dim, own)  # type: ignore[attr-defined]
    return parameter


def _loader(dim: int | None, own: int | None) -> Callable[[nn.Parameter, Tensor], None]:
    def load(parameter: nn.Parameter, whole: Tensor) -> None:
        place = parameter.data
        if dim is not None:
            size = own or place.shape[dim]
            place.zero_()
            place = place.narrow(dim, 0, size)
            whole = whole.narrow(dim, get_tensor_model_parallel_rank() * size, size)
        assert place.shape == whole.shape, f"{tuple(whole.shape)} for {tuple(place.shape)}"
        place.copy_(whole)

    return load


_OURS = re.compile(
    r"(?P<layer>.*\.(?:attention|mlp)\.)(?P<name>query|key|value|output|gate|up|down)\."
    r"(?:(?P<kind>weight|bias)(?:es|s)?(?:\.(?P<own>\d+))?|deltas\.(?P<delta>.+))"
)


def place_of_projection(name: str) -> tuple[str, int | None] | None:
    """The place of a folder's tensor in a `StepProjection`, and its part of a merged weight.

    None if it is no tensor of a projection.
    """
    found = _OURS.fullmatch(name)
    if found is None:
        return None
    projection, part = found["name"], None
    if projection in ("gate", "up"):
        projection, part = "gate_up", ("gate", "up").index(projection)
    if found["delta"] is not None:
        return f"{found['layer']}{projection}.deltas.{found['name']}.{found['delta']}", None
    return f"{found['layer']}{projection}.linears.{found['own'] or 0}.{found['kind']}", part
