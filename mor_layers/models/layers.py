"""The layers of a decoder in the Llama layout, which know the recursion step they run.

Legend: `b` batch, `k` tokens that run a step, `h` hidden, `n` heads, `d` head size.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mor_layers.cpu_kernels import rms_norm, swiglu
from mor_layers.layers import (
    Modulator,
    MoE,
    NormModulation,
    Projected,
    make_projection,
    project,
    weights_of,
)
from mor_layers.models.config import DecoderConfig
from mor_layers.models.latent_attention import LatentAttention
from mor_layers.models.rotary import Rotary
from mor_layers.recursion import ExpertUse, StepContext
from mor_layers.selection.fused import RMSNormWeight


class StepNorm(nn.Module):
    """RMSNorm over the last dimension, with one weight for all steps or one per step, and possibly a
    modulation by step and state."""

    def __init__(
        self,
        hidden_size: int,
        epsilon: float,
        num_weights: int = 1,
        modulation: NormModulation | None = None,
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weights = nn.ParameterList(
            nn.Parameter(torch.ones(hidden_size)) for _ in range(num_weights)
        )
        self.modulation = None if modulation is None else Modulator(hidden_size, modulation)

    def forward(
        self, hidden: Float[Tensor, "k b h"], step: int | Int[Tensor, "k b"] = 0
    ) -> Float[Tensor, "k b h"]:
        weight = self.weights[0]
        if len(self.weights) > 1:  # one step for all rows or, in generation, a step per row
            is_int = isinstance(step, int)
            weight = self.weights[step] if is_int else torch.stack(tuple(self.weights))[step]
        normed = rms_norm(hidden, weight, self.epsilon)
        return normed if self.modulation is None else self.modulation(normed, step)

    def at(self, step: int) -> RMSNormWeight | None:
        """The norm of a step; None if a modulation follows it."""
        if self.modulation is not None:
            return None
        # Looked at only: ZeRO takes an index of the list for a use, and would gather the weight for
        # the module that runs now instead of for this norm.
        weights = [own for _, own in self.weights.named_parameters(remove_duplicate=False)]
        return RMSNormWeight(weights[step if len(weights) > 1 else 0], self.epsilon)


class Attention(nn.Module):
    """Grouped-query self-attention with RoPE, under any KV policy."""

    def __init__(self, config: DecoderConfig, layer: int, num_steps: int = 1) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        width, kv_width = (n * config.head_size for n in (config.num_heads, config.kv_heads))
        size, bias = config.hidden_size, config.qkv_bias
        make = _projections(config, num_steps)
        self.query = make("query", size, width, bias=bias)
        self.key = make("key", size, kv_width, bias=bias)
        self.value = make("value", size, kv_width, bias=bias)
        self.output = make("output", width, size)
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            own = num_steps > 1 and "attention" in config.effective_recursion.own_per_step
            sizes = config.head_size, config.rms_norm_epsilon, num_steps if own else 1
            self.query_norm, self.key_norm = StepNorm(*sizes), StepNorm(*sizes)

    @property
    def num_heads(self) -> tuple[int, int]:
        """Query and key-value heads that this rank computes; see `tensor_parallel`."""
        rows = [len(weights_of(linear)[0]) for linear in (self.query, self.key)]
        return rows[0] // self.head_size, rows[1] // self.head_size

    @property
    def column_parallel(self) -> tuple[Projected, ...]:
        """The projections whose outputs are heads; see `tensor_parallel`."""
        return self.query, self.key, self.value

    def forward(
        self, hidden: Float[Tensor, "kx b h"], context: StepContext, rotary: Rotary
    ) -> Float[Tensor, "k b h"]:
        """`hidden` has the rows of `context.with_exited`, the result those that run the step."""
        query, key, value = self._project(hidden, context)
        query = rotary.turn(self._heads(query, context.step, self.query_norm))
        if key is not None and value is not None:
            key = rotary.turn(self._heads(key, context.step, self.key_norm))
            value = self._heads(value, context.step)
        out = context.attend(self.layer, query, key, value).flatten(2)  # [k b n d] -> [k b nd]
        (output,) = project((self.output,), out, context)
        return output

    def _project(
        self, hidden: Float[Tensor, "kx b h"], context: StepContext
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Queries of the tokens that run the step; keys and values if the step computes them."""
        if context.projects_alike:
            query, key, value = project((self.query, self.key, self.value), hidden, context)
            return query, key, value
        (query,) = project((self.query,), hidden[: context.tokens.shape[0]], context)
        if not context.projects_keys:
            return query, None, None
        rows = context.rows_to_project(hidden)
        key, value = project((self.key, self.value), rows, context)
        return query, key, value

    def _heads(
        self, values: Tensor, step: int | Tensor, norm: StepNorm | None = None
    ) -> Float[Tensor, "k b n d"]:
        heads = values.unflatten(-1, (-1, self.head_size))  # [k b nd] -> [k b n d]
        if norm is None:
            return heads
        return norm(heads, step if isinstance(step, int) else step[: len(heads), :, None])


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig, num_steps: int = 1) -> None:
        super().__init__()
        size, width = config.hidden_size, config.ffn_hidden_size
        make = _projections(config, num_steps)
        self.gate = make("gate", size, width)
        self.up = make("up", size, width)
        self.down = make("down", width, size)

    def forward(self, hidden: Float[Tensor, "k b h"], context: StepContext) -> Tensor:
        """`[k b h] -> [k b h]`."""
        gate, up = project((self.gate, self.up), hidden, context)
        (output,) = project((self.down,), swiglu(gate, up), context)
        return output


def _projections(config: DecoderConfig, num_steps: int) -> Callable[..., Projected]:
    """Makes projections of layers that run in `num_steps` steps, from a name and two sizes."""
    recursion = config.effective_recursion
    if num_steps == 1:  # layers outside the recursion: there are no steps to tell apart
        return partial(make_projection, relaxation=None, num_steps=1)
    return partial(
        make_projection,
        relaxation=recursion.relaxation,
        num_steps=num_steps,
        own=recursion.own_projections,
    )


class DecoderLayer(nn.Module):
    """Attention and MLP, each with a norm before it and a residual connection around it."""

    def __init__(
        self, config: DecoderConfig, layer: int, num_norms: int = 1, num_steps: int = 1
    ) -> None:
        super().__init__()
        sizes = config.hidden_size, config.rms_norm_epsilon, num_norms
        modulation = config.effective_recursion.norm_modulation if num_steps > 1 else None
        self.attention_norm = StepNorm(*sizes, modulation)
        self.attention = _attention(config, layer, num_steps)
        self.mlp_norm = StepNorm(*sizes, modulation)
        self.mlp = MLP(config, num_steps) if config.moe is None else _experts(config, num_steps)
        self.attention_output_norm = self.mlp_output_norm = None
        if num_steps > 1 and config.effective_recursion.sandwich_norms:
            self.attention_output_norm, self.mlp_output_norm = StepNorm(*sizes), StepNorm(*sizes)
        self.attention_sum_norm = self.mlp_sum_norm = None
        if config.sum_norms:
            self.attention_sum_norm, self.mlp_sum_norm = StepNorm(*sizes), StepNorm(*sizes)
        self.residual_factor = None
        if num_steps > 1:
            size = config.schedule.block_size
            self.residual_factor = config.effective_recursion.residual_factor(size)

    def forward(
        self,
        hidden: Float[Tensor, "k b h"],
        context: StepContext,
        rotary: Rotary,
        normed: Float[Tensor, "k b h"] | None = None,
    ) -> Float[Tensor, "k b h"]:
        """`normed` is the result of `attention_norm`, if it has been computed before."""
        if normed is None:
            normed = self.attention_norm(context.with_exited(hidden), context.step)
        output = self.attention(normed, context, rotary)
        if self.attention_output_norm is not None:
            output = self.attention_output_norm(output, context.step)
        hidden = hidden + self._scaled(output)
        if self.attention_sum_norm is not None:
            hidden = self.attention_sum_norm(hidden, context.step)
        normed = self.mlp_norm(hidden, context.step)
        if isinstance(self.mlp, MoE):
            is_padding = context.tokens.is_padding
            output, use = self.mlp(
                normed, context.step, is_padding, context.products, context.has_static_shapes
            )
            context.experts.record(self.attention.layer, use)
        else:
            output = self.mlp(normed, context)
        if self.mlp_output_norm is not None:
            output = self.mlp_output_norm(output, context.step)
        hidden = hidden + self._scaled(output)
        return hidden if self.mlp_sum_norm is None else self.mlp_sum_norm(hidden, context.step)

    def _scaled(self, output: Tensor) -> Tensor:
        return output if self.residual_factor is None else output * self.residual_factor


def _attention(config: DecoderConfig, layer: int, num_steps: int) -> Attention | LatentAttention:
    if config.latent_attention is None:
        return Attention(config, layer, num_steps)
    return LatentAttention(
        config.latent_attention,
        layer,
        config.hidden_size,
        config.num_heads,
        config.rms_norm_epsilon,
        _projections(config, num_steps),
        1.0 if config.rope_scaling is None else config.rope_scaling.latent_softmax_factor,
    )


def _experts(config: DecoderConfig, num_steps: int) -> MoE:
    assert config.moe is not None
    width, recursion = config.ffn_hidden_size, config.recursion
    if num_steps == 1 or recursion is None:
        return MoE(config.hidden_size, width, config.moe)
    routers, means = recursion.expert_routers, recursion.mean_experts
    return MoE(config.hidden_size, width, config.moe, num_steps, routers, means)


class ScaledEmbedding(nn.Embedding):
    """An embedding whose vectors are multiplied by a number."""

    def __init__(self, vocab_size: int, hidden_size: int, scale: float) -> None:
        super().__init__(vocab_size, hidden_size)
        self.scale = scale

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... h"]:  # type: ignore[override]
        hidden = super().forward(ids)
        return hidden if self.scale == 1 else hidden * self.scale


class DecoderStack(nn.Module):
    """A stack of decoder layers, used inside a RecursionBlock and as prelude and coda.

    Args:
        num_norms: number of weights of each norm: one, or one per step.
        num_steps: number of recursion steps that the stack runs in.
        norms_input: whether a norm comes before the first layer.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_layers: int,
        num_norms: int = 1,
        num_steps: int = 1,
        norms_input: bool = False,
    ) -> None:
        super().__init__()
        self.rotary_size, self.rope_base = config.rotary_size, config.rope_base
        self.rope_scaling = config.rope_scaling
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, num_norms, num_steps) for layer in range(num_layers)
        )
        self.input_norm = None
        if norms_input:
            self.input_norm = StepNorm(config.hidden_size, config.rms_norm_epsilon)

    def forward(
        self,
        hidden: Float[Tensor, "k b h"],
        context: StepContext,
        normed: Float[Tensor, "k b h"] | None = None,
    ) -> Float[Tensor, "k b h"]:
        """`normed` is `hidden` after the norm that `entry_norm` tells, or None."""
        if self.input_norm is not None:
            hidden = self.input_norm(hidden)
        rotary = Rotary.at(
            context.projected_positions,
            self.rotary_size,
            self.rope_base,
            hidden.dtype,
            self.rope_scaling,
        )
        for layer in self.layers:
            hidden, normed = layer(hidden, context, rotary, normed), None
        return hidden

    def entry_norm(self, step: int) -> RMSNormWeight | None:
        """The norm that a step begins with, unless it depends on more than the step."""
        norm = cast(DecoderLayer, self.layers[0]).attention_norm
        return norm.at(step)

    def advance(self, step: int, uses: list[dict[int, ExpertUse]]) -> None:
        """Update the state of the layers' routers over experts after an optimizer step.

        Args:
            uses: `StepContext.expert_use` of all runs of `step` that contributed to the optimizer step.
        """
        for index, layer in enumerate(self.layers):
            if isinstance(layer.mlp, MoE):
                own = [use[index] for use in uses]
                wanted = torch.stack([use.load + use.dropped for use in own]).sum(dim=0)
                histograms = [use.histogram for use in own if use.histogram is not None]
                histogram = torch.stack(histograms).sum(dim=0) if histograms else None
                layer.mlp.router.advance(step, wanted, histogram)
