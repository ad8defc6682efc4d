"""Multi-latent attention, whose keys and values are projections of one small row per token.

Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1), with the norms and the order of rotary elements
of its published checkpoints. A KV policy keeps, shares and updates latent rows and rotary parts of
keys. In training, each step projects the rows that it sees to keys and values. In generation, where
only these rows are cached, queries and outputs are projected instead ("absorbed" weights), which is
the same product in another order.

Legend: `b` batch, `k` tokens that run a step, `m` tokens they attend to, `h` hidden, `n` heads, `c`
latent row, `r` rotary part of a head, `u` the rest of a head, `d` = `u + r`, `v` head size of values.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mor_layers.layers import Projected, project, weights_of
from mor_layers.models.rotary import Rotary
from mor_layers.recursion import StepContext, attend
from mor_layers.settings import check_types


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Sizes of multi-latent attention. All are at least 1."""

    kv_lora_rank: int
    """Size of a token's latent row, from which keys and values of all heads are projected (c)."""
    qk_nope_head_dim: int
    """Numbers of a query or key head without rotary embedding (u)."""
    qk_rope_head_dim: int
    """Numbers of a query or key head with rotary embedding, even (r). Heads share those of the keys."""
    v_head_dim: int
    """Numbers of a value head (v)."""
    q_lora_rank: int | None = None
    """Size of the row from which queries are projected; None: from the hidden state."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank={self.q_lora_rank} must be at least 1, or None.")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even, because RoPE rotates numbers "
                "in pairs."
            )

    @property
    def head_size(self) -> int:
        """Numbers of a query or key head (d)."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def row_size(self) -> int:
        """Numbers that are kept of a token in each layer: latent row and rotary part."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def query_weights(self, hidden_size: int, num_heads: int) -> int:
        """Number of weights of the projections to queries."""
        out = num_heads * self.head_size
        if self.q_lora_rank is None:
            return hidden_size * out
        return self.q_lora_rank * (hidden_size + out)

    @property
    def norm_weights(self) -> int:
        """Number of weights of the norms of latent rows in a layer."""
        return self.kv_lora_rank + (self.q_lora_rank or 0)


class LatentAttention(nn.Module):
    """Multi-latent self-attention with RoPE, under any KV policy.

    Args:
        layer: 0-based index of the layer in its stack.
        norm_epsilon: of the norms of latent rows, which all steps share.
        make_output: makes the output projection, from its name and its two sizes.
        softmax_factor: what scores are multiplied by, beside the usual root of the head size; see
            `RopeScaling.latent_softmax_factor`.
    """

    def __init__(
        self,
        sizes: LatentAttentionConfig,
        layer: int,
        hidden_size: int,
        num_heads: int,
        norm_epsilon: float,
        make_output: Callable[..., Projected],
        softmax_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.sizes, self.layer, self.softmax_factor = sizes, layer, softmax_factor

        def linear(into: int, out: int) -> nn.Linear:
            return nn.Linear(into, out, bias=False)

        width, into = num_heads * sizes.head_size, hidden_size
        self.query_down = self.query_norm = None
        if sizes.q_lora_rank is not None:
            into = sizes.q_lora_rank
            self.query_down = linear(hidden_size, into)
            self.query_norm = nn.RMSNorm(into, eps=norm_epsilon)
        self.query_up = linear(into, width)
        self.kv_down = linear(hidden_size, sizes.row_size)
        self.kv_norm = nn.RMSNorm(sizes.kv_lora_rank, eps=norm_epsilon)
        per_head = sizes.qk_nope_head_dim + sizes.v_head_dim
        self.kv_up = linear(sizes.kv_lora_rank, num_heads * per_head)
        self.output = make_output("output", num_heads * sizes.v_head_dim, hidden_size)

    @property
    def num_heads(self) -> tuple[int, int]:
        """Query heads that this rank computes, and heads of the rows that it keeps, which is one."""
        return len(self.query_up.weight) // self.sizes.head_size, 1

    @property
    def column_parallel(self) -> tuple[Projected, ...]:
        """The projections whose outputs are heads; see `tensor_parallel`."""
        return self.query_up, self.kv_up

    def forward(
        self, hidden: Float[Tensor, "kx b h"], context: StepContext, rotary: Rotary
    ) -> Float[Tensor, "k b h"]:
        """`hidden` has the rows of `context.with_exited`, the result those that run the step."""
        query = self._query(hidden[: context.tokens.shape[0]], context, rotary)
        latent = position = None
        if context.projects_keys:
            latent, position = self._rows(context.rows_to_project(hidden), context, rotary)
        if context.keeps_latent_rows:
            out = self._attend_absorbed(query, latent, position, context)
        else:
            latent, position = context.exchange(self.layer, latent, position)
            key, value = self._keys_and_values(latent, position)
            out = attend(query, key, value, context.mask_for(query, key, value))
        (output,) = project((self.output,), out.flatten(2), context)  # [k b n v] -> [k b h]
        return output

    def _query(
        self, hidden: Float[Tensor, "k b h"], context: StepContext, rotary: Rotary
    ) -> Float[Tensor, "k b n d"]:
        if self.query_down is not None and self.query_norm is not None:
            (latent,) = project((self.query_down,), hidden, context)
            hidden = self.query_norm(latent)
        (heads,) = project((self.query_up,), hidden, context)
        heads = heads.unflatten(-1, (-1, self.sizes.head_size))
        content, position = heads.split(self._head_parts, dim=-1)
        query = torch.cat([content, rotary.turn(_regrouped(position))], dim=-1)
        return query if self.softmax_factor == 1 else query * self.softmax_factor

    def _rows(
        self, hidden: Float[Tensor, "w b h"], context: StepContext, rotary: Rotary
    ) -> tuple[Float[Tensor, "w b 1 c"], Float[Tensor, "w b 1 r"]]:
        parts = [self.sizes.kv_lora_rank, self.sizes.qk_rope_head_dim]
        (rows,) = project((self.kv_down,), hidden, context)
        latent, position = rows.split(parts, dim=-1)
        turned = rotary.turn(_regrouped(position[:, :, None]))
        return self.kv_norm(latent)[:, :, None], turned

    def _keys_and_values(
        self, latent: Float[Tensor, "m b 1 c"], position: Float[Tensor, "m b 1 r"]
    ) -> tuple[Float[Tensor, "m b n d"], Float[Tensor, "m b n v"]]:
        parts = [self.sizes.qk_nope_head_dim, self.sizes.v_head_dim]
        key, value = self.kv_up(latent[:, :, 0]).unflatten(-1, (-1, sum(parts))).split(parts, -1)
        return torch.cat([key, position.expand(*key.shape[:-1], -1)], dim=-1), value

    def _attend_absorbed(
        self,
        query: Float[Tensor, "k b n d"],
        latent: Float[Tensor, "w b 1 c"] | None,
        position: Float[Tensor, "w b 1 r"] | None,
        context: StepContext,
    ) -> Float[Tensor, "k b n v"]:
        """Attention of all heads to the latent rows themselves, which are keys and values at once."""
        (weight,), rank = weights_of(self.kv_up), self.sizes.kv_lora_rank
        nope = self.sizes.qk_nope_head_dim
        heads = weight.unflatten(0, (-1, nope + self.sizes.v_head_dim))  # [n u+v c]
        content, turned = query.split(self._head_parts, dim=-1)
        content = torch.einsum("kbnu,nuc->kbnc", content, heads[:, :nope])
        absorbed = torch.cat([content, turned], dim=-1)
        # Scores are divided by the root of the size of what is multiplied, here a whole row.
        absorbed = absorbed * (self.sizes.row_size / self.sizes.head_size) ** 0.5
        rows = None
        if latent is not None and position is not None:
            rows = torch.cat([latent, position], dim=-1)
        out = context.attend(self.layer, absorbed, rows, None)[..., :rank]
        return torch.einsum("kbnc,nvc->kbnv", out, heads[:, nope:])

    @property
    def _head_parts(self) -> list[int]:
        return [self.sizes.qk_nope_head_dim, self.sizes.qk_rope_head_dim]


def _regrouped(heads: Float[Tensor, "k b n r"]) -> Float[Tensor, "k b n r"]:
    """Even elements, then odd ones: the published weights pair neighbours, `Rotary` halves."""
    return torch.cat([heads[..., ::2], heads[..., 1::2]], dim=-1)
