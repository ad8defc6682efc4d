"""Settings of a decoder: its sizes, its recursion and its experts.

A wrong setting raises an error before anything is built.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from mor_layers.layers import MoEConfig
from mor_layers.models.latent_attention import LatentAttentionConfig
from mor_layers.models.limits import MOST_LAYERS, MOST_NUMBERS, MOST_TOKENS
from mor_layers.models.multi_token_prediction import MultiTokenPrediction
from mor_layers.models.recursion_config import RecursionConfig, unrolled_lengths
from mor_layers.models.rope_scaling import RopeScaling, YarnScaling
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
    rope_scaling: RopeScaling | None = None
    """How rotary frequencies are changed for longer texts; None: not at all."""
    tie_embeddings: bool = False
    """Whether input and output embeddings are one matrix."""
    recursion: RecursionConfig | tuple[RecursionConfig, ...] | None = None
    """The recursion, or several, which follow one another, each with the layers before and after it;
    None: a plain decoder."""
    latent_attention: LatentAttentionConfig | None = None
    """Multi-latent attention in all layers; None: grouped-query attention."""
    moe: MoEConfig | None = None
    """The mixture of experts that replaces the MLP; None: a dense MLP."""
    dense_ends: bool = False
    """Whether the layers outside of recursions (without recursion, the first and the last layer) keep
    a dense MLP although `moe` is set."""
    multi_token_prediction: MultiTokenPrediction | None = None
    """Heads that predict further tokens; None: only the next one is predicted. Their layers are like the
    model's last one."""
    embedding_scale: float = 1.0
    """What embeddings of tokens are multiplied by. Above 0. The output matrix is not, even if tied."""
    sum_norms: bool = False
    """Whether every layer, also outside of the recursion, normalises the sum of its state and the output
    of attention, and again of the MLP, as in Huginn (arXiv 2502.05171)."""

    def __post_init__(self) -> None:
        check_types(self)
        if isinstance(self.recursion, tuple) and len(self.recursion) < 2:
            if not self.recursion:
                raise ValueError(
                    "recursion is empty. Give one or more, or None for a plain decoder."
                )
            object.__setattr__(self, "recursion", self.recursion[0])
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
        for name in ("rms_norm_epsilon", "rope_base", "embedding_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0, and finite.")
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_base <= 1:
            raise ValueError(
                f"rope_base={self.rope_base} must be above 1 with YarnScaling, which divides by its "
                "logarithm."
            )
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
        if isinstance(self.recursion, tuple):
            num_unshared = sum(part.schedule.num_unshared for part in self.parts)
            self._check_all_but_the_last()
        else:
            if self.recursion is not None:
                self._check_recursion(self.recursion)
            num_unshared = self.schedule.num_unshared
        if self.dense_ends and (self.moe is None or not num_unshared):
            raise ValueError(
                "dense_ends=True needs moe, and layers outside the recursion. Leave it out, or set "
                "moe and sharing middle_cycle or middle_sequence, or prelude_layers or coda_layers."
            )

    def _check_recursion(self, recursion: RecursionConfig) -> None:
        """Raise ValueError if the one recursion does not fit the model."""
        recursion.schedule(self.num_unrolled_layers)
        recursion.require_experts(self.moe is not None)
        if recursion.sandwich_norms and self.sum_norms:
            raise ValueError(
                "sandwich_norms=True normalises what sum_norms=True normalises again in the sum. "
                "Leave one of the two out."
            )
        if recursion.exit_norm and not self.schedule.coda:
            raise ValueError(
                "exit_norm=True needs a coda, before which it normalises. Use coda_layers of 1 or "
                "more, or leave it out: the model's last norm follows anyway."
            )
        if self.moe is not None:
            self.moe.check_mean(recursion.mean_experts)

    def _check_all_but_the_last(self) -> None:
        """Raise ValueError for settings that only the last of several recursions can have."""
        for index, recursion in enumerate(self.recursions[:-1]):
            if recursion.loop_loss is not None:
                raise ValueError(
                    f"recursion[{index}].loop_loss={recursion.loop_loss} reads states out after every "
                    "step, through all layers that follow. Only the last recursion can have it, because "
                    "no other may be among them."
                )
            if recursion.exit_norm:
                raise ValueError(
                    f"recursion[{index}].exit_norm=True normalises before the coda. Only the last "
                    "recursion can have it."
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
        if isinstance(self.recursion, tuple):
            return  # `parts` checks each of them
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
    def beyond_llama(self) -> tuple[str, ...]:
        """The settings in use, outside of the recursion and of latent attention, that a Llama does not
        have."""
        used = {
            "embedding_scale": self.embedding_scale != 1,
            "sum_norms": self.sum_norms,
            "multi_token_prediction": self.multi_token_prediction is not None,
        }
        return tuple(name for name, is_used in used.items() if is_used)

    @property
    def head_config(self) -> "DecoderConfig":
        """The plain decoder whose layers the heads of multi-token prediction have: those of the last
        layer, with its experts."""
        is_dense = self.dense_ends and self.parts[-1].schedule.coda > 0
        moe = None if is_dense else self.moe
        return replace(self, moe=moe, dense_ends=False, recursion=None, multi_token_prediction=None)

    @property
    def recursions(self) -> tuple[RecursionConfig, ...]:
        """All recursions, in order; empty for a plain decoder."""
        if self.recursion is None:
            return ()
        return self.recursion if isinstance(self.recursion, tuple) else (self.recursion,)

    @property
    def parts(self) -> tuple["DecoderConfig", ...]:
        """The layers as a chain of decoders with one recursion each, or the decoder itself if it has at
        most one. The layers between two recursions are the coda of one and the prelude of the next.

        Raises:
            ValueError: a recursion does not fit the model; the message says which.
        """
        if not isinstance(self.recursion, tuple):
            return (self,)
        lengths, parts = unrolled_lengths(self.recursion, self.num_unrolled_layers), []
        for index, (recursion, length) in enumerate(zip(self.recursion, lengths, strict=True)):
            with _naming(index):
                part = replace(
                    self,
                    recursion=recursion,
                    num_unrolled_layers=length,
                    dense_ends=self.dense_ends and sum(recursion.ends) > 0,
                )
                parts.append(part)
        return tuple(parts)

    def only_recursion(self, subject: str) -> RecursionConfig | None:
        """The recursion, or None for a plain decoder.

        Args:
            subject: what needs it, for the error.

        Raises:
            ValueError: there are several recursions, which `subject` does not support.
        """
        if isinstance(self.recursion, tuple):
            raise ValueError(
                f"recursion has {len(self.recursion)} entries, but {subject} supports models with one "
                "recursion only. Use a single one here."
            )
        return self.recursion

    @property
    def effective_recursion(self) -> RecursionConfig:
        """The recursion; if there is none, a single step through the layers between the ends.

        Raises:
            ValueError: there are several; see `parts`.
        """
        recursion = self.only_recursion("this")
        return recursion or RecursionConfig(1, "middle_cycle" if self.dense_ends else "cycle")

    @property
    def schedule(self) -> SharingSchedule:
        """Which layer runs at which depth.

        Raises:
            ValueError: there are several recursions; see `parts`.
        """
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


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """A context in which errors say which recursion they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"recursion[{index}]: {error}") from error
