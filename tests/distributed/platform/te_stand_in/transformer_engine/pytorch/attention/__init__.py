"""DotProductAttention over `sbhd`, `bshd` and `thd`, with Transformer Engine's checks."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine import calls
from transformer_engine.signatures import bound

MASK_TYPES = (
    "no_mask",
    "padding",
    "causal",
    "padding_causal",
    "causal_bottom_right",
    "padding_causal_bottom_right",
    "arbitrary",
)


class DotProductAttention(nn.Module):
    @bound("DotProductAttention.__init__")
    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.qkv_format = given.get("qkv_format", "sbhd")
        self.attn_mask_type = given["attn_mask_type"]
        self.head_size = given["kv_channels"]
        self.num_heads = given["num_attention_heads"]
        self.num_groups = given.get("num_gqa_groups") or self.num_heads
        self.softmax_scale = given.get("softmax_scale")
        self.layer_number = given["layer_number"]

    @bound("DotProductAttention.forward")
    def forward(self, given: dict[str, Any]) -> Tensor:
        query, key, value = (given[f"{name}_layer"] for name in ("query", "key", "value"))
        mask, mask_type = given.get("attention_mask"), given.get("attn_mask_type")
        mask_type = mask_type or self.attn_mask_type
        layout = given.get("qkv_format") or self.qkv_format
        cu_seqlens = given.get("cu_seqlens_q"), given.get("cu_seqlens_kv")
        self._check(query, key, value, mask, mask_type, layout, cu_seqlens)
        calls.attention.append(
            calls.Attention(
                self.layer_number,
                layout,
                mask_type,
                tuple(query.shape),
                tuple(key.shape),
                None if mask is None else tuple(mask.shape),
                cu_seqlens[0],
                "unfused" if mask_type == "arbitrary" else "fused",
            )
        )
        if layout == "thd":
            return self._packed(given, query, key, value, mask_type)
        order = (1, 2, 0, 3) if layout == "sbhd" else (0, 2, 1, 3)
        out = self._attend(*(x.permute(order) for x in (query, key, value)), mask, mask_type)
        return out.permute((2, 0, 1, 3) if layout == "sbhd" else (0, 2, 1, 3)).flatten(2)

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        mask_type: str,
        layout: str,
        cu_seqlens: tuple[Tensor | None, Tensor | None],
    ) -> None:
        assert layout in ("sbhd", "bshd", "thd"), f"qkv_format={layout}"
        assert query.dtype == key.dtype == value.dtype, "queries, keys and values of other dtypes"
        assert key.shape[:-1] == value.shape[:-1], f"{key.shape=} {value.shape=}"
        assert query.shape[-1] == key.shape[-1] == self.head_size, f"{query.shape=} {key.shape=}"
        assert key.shape[-2] == self.num_groups, f"{key.shape=}, num_gqa_groups={self.num_groups}"
        assert query.shape[-2] == self.num_heads, f"{query.shape=}"
        assert mask_type in MASK_TYPES, f"attn_mask_type={mask_type}"
        assert all(x.ndim == (3 if layout == "thd" else 4) for x in (query, key, value)), layout
        if layout == "thd":
            assert "padding" in mask_type, f"thd with {mask_type}"
            assert mask is None, "thd takes no mask"
            for given in cu_seqlens:
                assert given is not None, "thd without cu_seqlens"
                assert given.ndim == 1, "cu_seqlens must be [batch + 1]"
                assert given.dtype == torch.int32, f"cu_seqlens of {given.dtype}"
                assert bool((given.diff() >= 0).all()), "cu_seqlens must not fall"
            assert cu_seqlens[0].shape == cu_seqlens[1].shape  # type: ignore[union-attr]
            return
        batch, s, m = query.shape[1], len(query), len(key)
        if layout == "bshd":
            batch, s, m = len(query), query.shape[1], key.shape[1]
        if mask_type in ("no_mask", "causal", "causal_bottom_right"):
            # Transformer Engine reads no mask then: one that is given would be lost silently.
            assert mask is None, f"a mask with attn_mask_type={mask_type}"
        if mask_type == "causal":
            assert s == m, f"{s} queries and {m} keys: aligned to the top left"
        if mask_type == "arbitrary":
            assert mask is not None, "arbitrary without a mask"
            assert mask.dtype == torch.bool, f"mask of {mask.dtype}"
            assert torch.broadcast_shapes(mask.shape, (batch, self.num_heads, s, m)) == (
                batch,
                self.num_heads,
                s,
                m,
            ), f"{mask.shape=}"

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, mask_type: str
    ) -> Tensor:
        """`[b n s d]`."""
        if mask_type not in ("causal", "no_mask", "arbitrary"):
            raise NotImplementedError(f"attn_mask_type={mask_type} in the stand-in")
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask is None else ~mask,
            is_causal=mask_type == "causal",
            scale=self.softmax_scale,
            enable_gqa=True,
        )

    def _packed(
        self, given: dict[str, Any], query: Tensor, key: Tensor, value: Tensor, mask_type: str
    ) -> Tensor:
        """Rows beyond the last sequence stay 0."""
        borders, kv_borders = given["cu_seqlens_q"].tolist(), given["cu_seqlens_kv"].tolist()
        assert borders == kv_borders, "the stand-in packs queries and keys alike"
        longest = max((b - a for a, b in pairwise(borders)), default=0)
        for name in ("max_seqlen_q", "max_seqlen_kv"):
            assert given.get(name) is not None, f"{name} is derived by a wait for the device"
            assert given[name] >= longest, f"{name}={given[name]}, longest sequence {longest}"
        parts = []
        for begin, end in pairwise(borders):
            if begin == end:
                continue
            rows = (x[begin:end].transpose(0, 1)[None] for x in (query, key, value))
            kind = "causal" if mask_type == "padding_causal" else "no_mask"
            parts.append(self._attend(*rows, None, kind)[0].transpose(0, 1))
        parts.append(query.new_zeros(len(query) - borders[-1], *query.shape[1:]))
        return torch.cat(parts).flatten(1)
