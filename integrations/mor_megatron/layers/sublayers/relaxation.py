"""Per-step deltas on the linear layers of Megatron's attention and MLP, sharded like their weights.

    column-parallel (query, key, value, gate, up)   y = W_t x + scale · B_t (A x)         B by rows
    row-parallel (output, down)                     y = Σ W_t x_t + scale · B Σ A_t x_t   A by columns

Only `A x` is communicated between ranks: per token as many numbers as the rank of the delta. Under
sequence parallelism the matrices that are not sharded see only a part of the tokens and are marked,
so that `finalize_model_grads` sums their gradients. Fused weights keep Megatron's layout
(`linear_qkv` is `[q.., k, v]` per query group, `linear_fc1` is `[gate, up]`), whereas each
projection has a delta of its own: the gathered tensors are those of a `MoRTransformer`.

Legend: `p` tokens that the linear layers see, `b` batch, `g` key-value heads and `d` head size of
this rank, `i` inputs, `o` outputs, `q` rank of the delta.
"""

from typing import Any, ClassVar, cast

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from mor_layers import Relaxation
from mor_layers.layers import Projection, StepDelta, norms_over_ranks
from mor_megatron.layers.sublayers.per_step import attentions_of
from mor_megatron.layers.sublayers.step_aware import StepAware

_ATTENTION: tuple[Projection, ...] = ("query", "key", "value", "output")


class ParallelDelta(StepDelta):
    """This rank's shard of a `StepDelta`."""

    axes: ClassVar[dict[str, int]]
    """The dimension along which each sharded parameter is split over the ranks."""

    def __init__(
        self, into: int, out: int, relaxation: Relaxation, group: ProcessGroup, config: Any
    ) -> None:
        super().__init__(into, out, relaxation)
        self.group, self.is_spread = group, config.sequence_parallel
        self.dtype = config.params_dtype

    def cut(self, weight: Tensor) -> None:
        """Keep this rank's shard, initialised so that the projection by `weight` is unchanged.

        `weight` is this rank's shard of the shared weight.
        """
        size, rank = self.group.size(), self.group.rank()
        nn.init.normal_(self.a, std=0.02)
        for name, parameter in list(self.named_parameters()):
            own = parameter.detach()
            if name in self.axes:
                own = own.chunk(size, self.axes[name])[rank]
            own = nn.Parameter(own.to(weight.device, self.dtype, copy=True))
            if name in self.axes:
                set_tensor_model_parallel_attributes(own, True, self.axes[name], 1)
            else:
                setattr(own, "sequence_parallel", self.is_spread)  # noqa: B010
            setattr(self, name, own)
        if self.magnitude is not None:
            with torch.no_grad():
                self.magnitude.copy_(self.norms(weight))


class ColumnParallelDelta(ParallelDelta):
    """The delta of a column-parallel projection, whose outputs are split over the ranks."""

    axes: ClassVar = {"b": 0, "magnitude": 0}

    def lowered(self, hidden: Tensor) -> Tensor:
        """`[p/tp b i]` under sequence parallelism, else `[p b i]`, to `[p b q]`."""
        low = F.linear(hidden, self.a)
        if self.is_spread:
            return gather_from_sequence_parallel_region(low, True, self.group)
        return copy_to_tensor_model_parallel_region(low, self.group)


class RowParallelDelta(ParallelDelta):
    """The delta of a row-parallel projection, whose inputs are split over the ranks."""

    axes: ClassVar = {"a": 1}

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        return norms_over_ranks(super().norms(weight), self.group)

    def lowered(self, hidden: Tensor) -> Tensor:
        """`[p b i]` to `[p/tp b q]` under sequence parallelism, else to `[p b q]`."""
        low = F.linear(hidden, self.a)
        if self.is_spread:
            return reduce_scatter_to_sequence_parallel_region(low, self.group)
        return reduce_from_tensor_model_parallel_region(low, self.group)


class StepDeltas(StepAware, nn.ModuleDict):
    """The deltas of one layer's attention or MLP: for each projection, one per step.

    They are forward hooks on Megatron's linear layers, which receive no step context; hence
    `StepAware`.
    """

    def relax(self, name: str, hidden: Tensor, projected: Tensor, weight: Tensor) -> Tensor:
        """Add the current step's delta to `projected`, if projection `name` has deltas.

        Args:
            weight: this rank's shard of the shared weight, in any shape that flattens to `[o i]`.
        """
        if name not in self:
            return projected
        delta = cast(nn.ModuleList, self[name])[self.step]
        assert isinstance(delta, ParallelDelta)
        if delta.magnitude is not None:
            weight = weight.reshape(-1, weight.shape[-1])
        return delta(hidden, projected, weight)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The tensors of all deltas, sharded over the ranks."""
        groups = ensure_metadata_has_dp_cp_group(metadata)
        state: dict[str, Any] = {}
        for name, delta in self.named_modules():
            if isinstance(delta, ParallelDelta):
                state |= make_sharded_tensors_for_checkpoint(
                    delta.state_dict(keep_vars=True),
                    f"{prefix}{name}.",
                    delta.axes,
                    sharded_offsets,
                    tp_group=delta.group,
                    dp_cp_group=groups["dp_cp_group"],
                )
        return state


def attach_deltas(
    layer: Any, relaxation: Relaxation, num_steps: int, config: TransformerConfig
) -> None:
    """Add deltas to the attention and MLP of a layer, as hooks on their linear layers.

    Raises:
        ValueError: a linear layer includes its norm, so that the delta would see another input.
    """
    names, attention, mlp = relaxation.projections, attentions_of(layer)[0], layer.mlp
    fused = (
        (layer.input_layernorm, "input_layernorm", ("query", "key", "value")),
        (layer.pre_mlp_layernorm, "pre_mlp_layernorm", ("gate", "up")),
    )
    for norm, place, fed in fused:
        if isinstance(norm, IdentityOp) and set(fed) & set(names):
            raise ValueError(
                f"deltas of {', '.join(n for n in fed if n in names)} need a separate norm at "
                f"{place}; this layer spec fuses it into the next linear layer. Use a local layer "
                "spec, or other Relaxation.projections."
            )
    size = config.kv_channels
    assert size is not None and config.num_query_groups is not None
    h, width = config.hidden_size, config.ffn_hidden_size
    heads, groups = config.num_attention_heads * size, config.num_query_groups * size
    is_latent = isinstance(attention, MLASelfAttention)
    joined = attention.query_projection_size if is_latent else heads  # what attention returns
    sizes = {
        "query": (h, heads),
        "key": (h, groups),
        "value": (h, groups),
        "output": (joined, h),
        "gate": (h, width),
        "up": (h, width),
        "down": (width, h),
    }
    group = attention.linear_proj.tp_group

    def deltas(chosen: tuple[str, ...], weights: dict[str, Tensor]) -> StepDeltas:
        made = StepDeltas()
        for name in (name for name in names if name in chosen):
            kind = RowParallelDelta if name in ("output", "down") else ColumnParallelDelta
            own = [kind(*sizes[name], relaxation, group, config) for _ in range(num_steps)]
            for delta in own:
                delta.cut(weights[name].reshape(-1, weights[name].shape[-1]))
            made[name] = nn.ModuleList(own)
        return made

    if set(names) & set(_ATTENTION):
        weights = {"output": attention.linear_proj.weight}
        if not (is_latent or config.attention_output_gate):  # `validation`: no others there
            parts = attention.parts_of(attention.linear_qkv.weight)
            weights |= dict(zip(("query", "key", "value"), parts, strict=True))
            attention.linear_qkv.register_forward_hook(attention.relax_qkv)
        attention.deltas = deltas(_ATTENTION, weights)
        attention.linear_proj.register_forward_hook(attention.relax_output)
    if isinstance(mlp, MoELayer) or not set(names) - set(_ATTENTION):
        return
    weights = dict(zip(_first_names(config), _first_parts(mlp, mlp.linear_fc1.weight), strict=True))
    mlp.deltas = deltas(("gate", "up", "down"), weights | {"down": mlp.linear_fc2.weight})

    def relax_first(linear: Any, inputs: tuple[Tensor, ...], output: Any) -> Any:
        named = zip(
            _first_names(config),
            output[0].chunk(len(_first_names(config)), dim=-1),
            _first_parts(mlp, linear.weight),
            strict=True,
        )
        relaxed = [mlp.deltas.relax(name, inputs[0], part, weight) for name, part, weight in named]
        return (torch.cat(relaxed, dim=-1), *output[1:])

    def relax_second(linear: Any, inputs: tuple[Tensor, ...], output: Any) -> Any:
        return mlp.deltas.relax("down", inputs[0], output[0], linear.weight), *output[1:]

    mlp.linear_fc1.register_forward_hook(relax_first)
    mlp.linear_fc2.register_forward_hook(relax_second)


def _first_names(config: TransformerConfig) -> tuple[str, ...]:
    return ("gate", "up") if config.gated_linear_unit else ("up",)


def _first_parts(mlp: Any, weight: Tensor) -> tuple[Tensor, ...]:
    return weight.chunk(len(_first_names(mlp.config)))
