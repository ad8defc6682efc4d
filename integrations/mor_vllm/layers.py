"""The layers that run at several depths: attention, and an MLP or a mixture of experts.

Legend: `t` tokens of a batch, from any requests; `h` hidden.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from vllm.model_executor.layers.activation import SiluAndMul  # type: ignore[import-not-found]

from mor_layers import DecoderConfig
from mor_vllm.attention import ServedStep, StepAttention, norms, of_step
from mor_vllm.experts import ShardedMoE
from mor_vllm.projections import StepProjection


class SwiGLU(nn.Module):
    """The MLP."""

    def __init__(self, config: DecoderConfig, num_steps: int) -> None:
        super().__init__()
        h, width = config.hidden_size, config.ffn_hidden_size
        self.gate_up = StepProjection(["gate", "up"], h, [width, width], config, num_steps)
        self.down = StepProjection(["down"], width, [h], config, num_steps)
        self.activation = SiluAndMul()

    def forward(self, hidden: Float[Tensor, "t h"], context: ServedStep) -> Float[Tensor, "t h"]:
        gated = self.activation(self.gate_up(hidden, context.step))
        return self.down(gated, context.step)


class StepLayer(nn.Module):
    """Attention and MLP, like `mor_layers.models.layers.DecoderLayer`."""

    def __init__(
        self, config: DecoderConfig, depths: Sequence[int], vllm_config: Any, has_experts: bool
    ) -> None:
        super().__init__()
        recursion, num_steps = config.effective_recursion, len(depths)
        repeats = num_steps > 1
        count = num_steps if repeats and not recursion.share_norms else 1
        self.attention_norm = norms(config, count)
        self.attention = StepAttention(config, depths, vllm_config)
        self.mlp_norm = norms(config, count)
        self.mlp = (
            ShardedMoE(config, num_steps, vllm_config) if has_experts else SwiGLU(config, num_steps)
        )
        self.attention_output_norm = self.mlp_output_norm = None
        if repeats and recursion.sandwich_norms:
            self.attention_output_norm, self.mlp_output_norm = (
                norms(config, count) for _ in range(2)
            )
        self.residual_factor = None
        if repeats:
            self.residual_factor = recursion.residual_factor(config.schedule.block_size)

    def forward(
        self, hidden: Float[Tensor, "t h"], context: ServedStep, layer: int
    ) -> Float[Tensor, "t h"]:
        step = context.step
        hidden = context.with_kept(hidden)
        output = self.attention(of_step(self.attention_norm, step)(hidden), context, layer)
        hidden = hidden + self._branch(output, self.attention_output_norm, step)
        output = self.mlp(of_step(self.mlp_norm, step)(hidden), context)
        return hidden + self._branch(output, self.mlp_output_norm, step)

    def _branch(self, output: Tensor, norm: nn.ModuleList | None, step: int) -> Tensor:
        """What attention or MLP adds to the residual stream."""
        if norm is not None:
            output = of_step(norm, step)(output)
        return output if self.residual_factor is None else output * self.residual_factor


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
