"""The model of a run."""

import math
from dataclasses import dataclass
from typing import Literal

from mor_layers.layers import MOST_EXPERTS
from mor_layers.models import MOST_LAYERS, MOST_NUMBERS, LatentAttentionConfig, RopeScaling
from mor_megatron.parallel import rotary_settings
from mor_tools.pretraining.settings.rules import require, require_at_least, require_at_most

Dispatcher = Literal["allgather", "alltoall"]


@dataclass(frozen=True)
class MoESettings:
    """A mixture of experts that replaces the MLP."""

    num_experts: int = 4
    """Experts per layer."""
    experts_per_token: int = 2
    """Experts each token is sent to. From 1 to `num_experts`."""
    ffn_hidden_size: int = 256
    """Inner width of one expert."""
    balance_coefficient: float = 0.01
    """Weight of the load balancing loss. 0: none."""
    z_loss_coefficient: float = 0.001
    """Weight of the z-loss on the expert router's logits. 0: none."""
    dispatcher: Dispatcher = "alltoall"
    """How tokens reach their experts: `allgather` or `alltoall`."""
    dense_ends: bool = True
    """Whether the unshared layers before and after the recursion (without one, the first and the last
    layer) keep a dense MLP."""

    def __post_init__(self) -> None:
        owner = "model.moe"
        require_at_least(2, owner, num_experts=self.num_experts)
        require_at_most(MOST_EXPERTS, owner, num_experts=self.num_experts)
        require_at_most(MOST_NUMBERS, owner, ffn_hidden_size=self.ffn_hidden_size)
        require_at_least(1, owner, ffn_hidden_size=self.ffn_hidden_size)
        require_at_least(
            0,
            owner,
            balance_coefficient=self.balance_coefficient,
            z_loss_coefficient=self.z_loss_coefficient,
        )
        require(
            1 <= self.experts_per_token <= self.num_experts,
            f"{owner}.experts_per_token={self.experts_per_token} must lie between 1 and "
            f"num_experts={self.num_experts}.",
        )


@dataclass(frozen=True)
class ModelSettings:
    """A GPT in the Llama layout: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases.

    `latent_attention` replaces the attention by that of DeepSeek-V2.
    """

    hidden_size: int = 192
    """Width of the residual stream; a multiple of `num_heads`."""
    ffn_hidden_size: int = 512
    """Inner width of the dense MLPs."""
    num_unrolled_layers: int = 8
    """Depth counted with repeats: every run of a shared layer counts."""
    num_heads: int = 6
    """Query heads; a multiple of `num_kv_heads`."""
    num_kv_heads: int = 2
    """Key-value heads; with `latent_attention`, equal to `num_heads`."""
    head_dim: int | None = None
    """Numbers per head, even. null: `hidden_size / num_heads`."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases, as in Qwen2."""
    qk_norm: bool = False
    """Whether queries and keys are normalised, as in Qwen3."""
    rms_norm_epsilon: float = 1e-5
    """Added to the mean square before taking the root."""
    rope_base: int = 10000
    """Base of the rotary position embedding."""
    rope_scaling: RopeScaling | None = None
    """How rotary frequencies are changed for longer texts: `{rope_type: linear, llama3 or yarn, factor:
    ..., ...}`; null: not at all."""
    tie_embeddings: bool = False
    """Whether input and output embeddings are one matrix."""
    latent_attention: LatentAttentionConfig | None = None
    """Multi-latent attention in all layers; null: grouped-query attention."""
    moe: MoESettings | None = None
    """Mixture of experts; null: dense MLPs everywhere."""

    def __post_init__(self) -> None:
        owner = "model"
        for name in ("hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "rope_base"):
            require_at_least(1, owner, **{name: getattr(self, name)})
        require_at_least(1, owner, num_unrolled_layers=self.num_unrolled_layers)
        require_at_most(MOST_LAYERS, owner, num_unrolled_layers=self.num_unrolled_layers)
        for name in ("hidden_size", "ffn_hidden_size", "num_heads", "head_dim"):
            require_at_most(MOST_NUMBERS, owner, **{name: getattr(self, name)})
        require_at_most(10**12, owner, rope_base=self.rope_base)
        require(
            self.head_dim is not None
            or self.latent_attention is not None
            or self.hidden_size % (2 * self.num_heads) == 0,
            f"{owner}.hidden_size={self.hidden_size} must be an even multiple of "
            f"num_heads={self.num_heads}, because RoPE rotates the numbers of a head in pairs.",
        )
        require(
            self.head_dim is None or (self.head_dim > 0 and self.head_dim % 2 == 0),
            f"{owner}.head_dim={self.head_dim} must be even and at least 2.",
        )
        require(
            0 < self.rms_norm_epsilon < math.inf,
            f"{owner}.rms_norm_epsilon={self.rms_norm_epsilon} must be above 0, and finite.",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"{owner}.num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}.",
        )
        if self.latent_attention is not None:
            self._check_latent_attention()
        try:
            rotary_settings(self.rope_base, self.rope_scaling, self.latent_attention is not None)
        except ValueError as error:
            raise ValueError(f"{owner}.{error}") from error

    def _check_latent_attention(self) -> None:
        """Refuse settings that latent attention would not use."""
        unused = {
            "num_kv_heads": (self.num_kv_heads, self.num_heads),
            "head_dim": (self.head_dim, None),
            "qkv_bias": (self.qkv_bias, False),
            "qk_norm": (self.qk_norm, False),
        }
        for name, (given, only) in unused.items():
            shown = "null" if only is None else str(only).lower()
            require(
                given == only,
                f"model.{name}={given} has no effect with model.latent_attention, whose heads have "
                "sizes of their own, no biases, and norms on latent rows. Set "
                f"model.{name}={shown}.",
            )
