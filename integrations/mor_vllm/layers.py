"""The layers that run at several depths: attention, and an MLP or a mixture of experts.

Legend: `t` tokens of a batch, from any requests; `h` hidden, `e` experts, `f` width of an expert.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from vllm.distributed import (  # type: ignore[import-not-found]
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.activation import SiluAndMul  # type: ignore[import-not-found]
from vllm.model_executor.layers.linear import (  # type: ignore[import-not-found]
    MergedColumnParallelLinear,
    RowParallelLinear,
)

from mor_layers import DecoderConfig
from mor_layers.layers import MoE
from mor_vllm.attention import ServedStep, StepAttention, norms


class SwiGLU(nn.Module):
    """The MLP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        h, width = config.hidden_size, config.ffn_hidden_size
        self.gate_up = MergedColumnParallelLinear(h, [width] * 2, bias=False)
        self.down = RowParallelLinear(width, h, bias=False)
        self.activation = SiluAndMul()

    def forward(self, hidden: Float[Tensor, "t h"], context: ServedStep) -> Float[Tensor, "t h"]:
        return self.down(self.activation(self.gate_up(hidden)[0]))[0]


class ShardedMoE(MoE):
    """A mixture of experts, with every expert split over the ranks along its width.

    It does not use vLLM's fused layer, which does not support a varying number of experts per
    token, a router for each step or its loss-free bias. These must choose the same experts as in
    training.
    """

    def __init__(self, config: DecoderConfig, num_steps: int) -> None:
        assert config.moe is not None
        ranks = get_tensor_model_parallel_world_size()
        width = (config.moe.ffn_hidden_size or config.ffn_hidden_size) // ranks
        moe, recursion = replace(config.moe, ffn_hidden_size=None), config.effective_recursion
        of_steps = (num_steps, recursion.expert_routers, recursion.mean_experts)
        with in_fp32():
            super().__init__(config.hidden_size, width, moe, *(of_steps if num_steps > 1 else ()))
        self.experts.to(torch.get_default_dtype())
        for parameter, dim in zip(self.experts.parameters(), (1, 1, 2), strict=True):
            parameter.weight_loader = _loader_of_shard(dim)  # type: ignore[attr-defined]

    def forward(  # type: ignore[override]
        self, hidden: Float[Tensor, "t h"], context: ServedStep
    ) -> Float[Tensor, "t h"]:
        output, _ = super().forward(hidden[None], context.step, context.tokens.is_padding)
        return tensor_model_parallel_all_reduce(output[0])


class StepLayer(nn.Module):
    """Attention and MLP, like `mor_layers.models.layers.DecoderLayer`."""

    def __init__(
        self, config: DecoderConfig, depths: Sequence[int], vllm_config: Any, has_experts: bool
    ) -> None:
        super().__init__()
        recursion = config.effective_recursion
        repeats = len(depths) > 1
        count = len(depths) if repeats and not recursion.share_norms else 1
        self.attention_norm = norms(config, count)
        self.attention = StepAttention(config, depths, vllm_config)
        self.mlp_norm = norms(config, count)
        self.mlp = ShardedMoE(config, len(depths)) if has_experts else SwiGLU(config)
        self.attention_output_norm = self.mlp_output_norm = None
        if repeats and recursion.sandwich_norms:
            self.attention_output_norm, self.mlp_output_norm = (
                norms(config, count) for _ in range(2)
            )

    def forward(
        self, hidden: Float[Tensor, "t h"], context: ServedStep, layer: int
    ) -> Float[Tensor, "t h"]:
        own = context.step if len(self.attention_norm) > 1 else 0
        hidden = context.with_kept(hidden)
        output = self.attention(self.attention_norm[own](hidden), context, layer)
        if self.attention_output_norm is not None:
            output = self.attention_output_norm[own](output)
        hidden = hidden + output
        output = self.mlp(self.mlp_norm[own](hidden), context)
        if self.mlp_output_norm is not None:
            output = self.mlp_output_norm[own](output)
        return hidden + output


class StepLayers(nn.Module):
    """Layers that run one after another, each at its own depths."""

    def __init__(
        self,
        config: DecoderConfig,
        depths: Sequence[Sequence[int]],
        vllm_config: Any,
        has_experts: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            StepLayer(config, own, vllm_config, has_experts) for own in depths
        )

    def forward(self, hidden: Float[Tensor, "t h"], context: ServedStep) -> Float[Tensor, "t h"]:
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, context, index)
        return hidden


@contextmanager
def in_fp32() -> Iterator[None]:
    """A context in which parameters and buffers are created in fp32, the precision in which routers
    score.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _loader_of_shard(dim: int) -> Any:
    def load(parameter: nn.Parameter, whole: Tensor) -> None:
        size = parameter.shape[dim]
        own = whole.narrow(dim, get_tensor_model_parallel_rank() * size, size)
        assert parameter.shape == own.shape
        parameter.data.copy_(own)

    return load
