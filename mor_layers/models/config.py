"""Settings of a decoder: its sizes, its recursion and its experts.

A wrong setting raises an error before anything is built.
"""

import math
from dataclasses import dataclass

from mor_layers.layers import MoEConfig
from mor_layers.models.latent_attention import LatentAttentionConfig
from mor_layers.models.limits import MOST_LAYERS, MOST_NUMBERS, MOST_TOKENS
from mor_layers.models.recursion_config import RecursionConfig
from mor_layers.recursion import SharingSchedule
from mor_layers.settings import check_types


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder in the Llama layout: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases.

    `qkv_bias` makes it a Qwen2, `qk_norm` a Qwen3; `latent_attention` is that of DeepSeek-V2.
    """

    vocab_size: int
    """Number of token ids."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the MLP."""
    num_unrolled_layers: int
    """Depth counted with repeats."""
    num_heads: int
    """Query heads; divides `hidden_size` unless `head_dim` is given."""
    num_kv_heads: int | None = None
    """Key-value heads; divides `num_heads`. Default: `num_heads`."""
    head_dim: int | None = None
    """Numbers per head, even. Default: `hidden_size / num_heads`; see `head_size`."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values add a bias."""
    qk_norm: bool = False
    """Whether each head of queries and keys is normalised (RMSNorm) before RoPE. Heads and steps share
    the weights."""
    rms_norm_epsilon: float = 1e-5
    """Added to the mean square before taking the root."""
    rope_base: float = 10000.0
    """Base of the rotary position embedding."""
    tie_embeddings: bool = False
    """Whether input and output embeddings are one matrix."""
    recursion: RecursionConfig | None = None
    """The recursion; None: a plain decoder."""
    latent_attention: LatentAttentionConfig | None = None
    """Multi-latent attention in all layers; None: grouped-query attention."""
    moe: MoEConfig | None = None
    """The mixture of experts that replaces the MLP; None: a dense MLP."""
    dense_ends: bool = False
    """Whether the unshared layers at both ends (without recursion, the first and the last layer) keep
    a dense MLP although `moe` is set."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("vocab_size", "hidden_size", "ffn_hidden_size", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_unrolled_layers < 1:
            raise ValueError(f"num_unrolled_layers={self.num_unrolled_layers} must be at least 1.")
        for name, most in (
            ("vocab_size", MOST_TOKENS),
            ("hidden_size", MOST_NUMBERS),
            ("ffn_hidden_size", MOST_NUMBERS),
            ("num_heads", MOST_NUMBERS),
            ("head_dim", MOST_NUMBERS),
            ("num_unrolled_layers", MOST_LAYERS),
        ):
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"{name}={getattr(self, name)} must be at most {most}.")
        for name in ("rms_norm_epsilon", "rope_base"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0, and finite.")
        if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2):
            raise ValueError(
                f"head_dim={self.head_dim} must be even and at least 2, because RoPE rotates the "
                "numbers of a head in pairs."
            )
        if self.latent_attention is not None:
            self._check_latent_attention()
        elif self.head_dim is None and (self.hidden_size % self.num_heads or self.head_size % 2):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be an even multiple of "
                f"num_heads={self.num_heads}, because RoPE rotates the numbers of a head in pairs. "
                "Or set head_dim."
            )
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}."
            )
        if self.recursion is not None:
            self.recursion.schedule(self.num_unrolled_layers)
            self.recursion.require_experts(self.moe is not None)
            if self.moe is not None:
                self.moe.check_mean(self.recursion.mean_experts)
        if self.dense_ends and (self.moe is None or not self.schedule.num_unshared):
            raise ValueError(
                "dense_ends=True needs moe, and layers outside the recursion. Leave it out, or set "
                "moe and sharing middle_cycle or middle_sequence, or prelude_layers or coda_layers."
            )

    def _check_latent_attention(self) -> None:
        """Raise ValueError for settings that latent attention has no place for."""
        unused = {
            "head_dim": self.head_dim is not None,
            "num_kv_heads": self.num_kv_heads not in (None, self.num_heads),
            "qkv_bias": self.qkv_bias,
            "qk_norm": self.qk_norm,
        }
        for name in (name for name, is_set in unused.items() if is_set):
            raise ValueError(
                f"{name}={getattr(self, name)} is not a setting of latent_attention, whose heads have "
                "sizes of their own, no biases, and norms on latent rows. Leave it out."
            )
        recursion = self.effective_recursion
        relaxed = () if recursion.relaxation is None else recursion.relaxation.projections
        if wrong := tuple(n for n in relaxed if n in ("query", "key", "value")):
            raise ValueError(
                f"Relaxation.projections={relaxed} has {', '.join(wrong)}, which latent_attention "
                "projects in two stages, for which there are no deltas. Use 'output', 'gate', 'up' or "
                "'down'."
            )
        if "attention" in recursion.own_per_step:
            raise ValueError(
                f"own_per_step={recursion.own_per_step} cannot have latent_attention of each step: "
                "steps share its latent rows' projections. Leave attention out."
            )

    @property
    def effective_recursion(self) -> RecursionConfig:
        """The recursion; if there is none, a single step through the layers between the ends."""
        plain = RecursionConfig(1, sharing="middle_cycle" if self.dense_ends else "cycle")
        return self.recursion or plain

    @property
    def schedule(self) -> SharingSchedule:
        """Which layer runs at which depth."""
        return self.effective_recursion.schedule(self.num_unrolled_layers)

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads`, or its default."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Numbers of a query head: `head_dim`, or its default, or that of `latent_attention`."""
        if self.latent_attention is not None:
            return self.latent_attention.head_size
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_size(self) -> int:
        """How many numbers of a head are rotated."""
        latent = self.latent_attention
        return self.head_size if latent is None else latent.qk_rope_head_dim

    @property
    def attention_output_size(self) -> int:
        """Numbers that the heads of a layer return together, the input of the output projection."""
        latent = self.latent_attention
        return self.num_heads * (self.head_size if latent is None else latent.v_head_dim)

    @property
    def cached_heads(self) -> tuple[int, int]:
        """Heads that a cache keeps of a token in each layer, and their size: key-value heads, or the
        latent row."""
        latent = self.latent_attention
        return (self.kv_heads, self.head_size) if latent is None else (1, latent.row_size)
