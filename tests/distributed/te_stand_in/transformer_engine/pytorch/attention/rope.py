"""Fused rotary embedding is not emulated: selected tokens are turned by our own code."""

from typing import Any


def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("the stand-in has no fused rotary embedding")
