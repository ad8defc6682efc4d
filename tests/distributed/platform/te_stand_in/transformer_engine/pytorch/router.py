"""Fused routing over experts (`moe_router_fusion`) is not emulated."""

from typing import Any


def fused_topk_with_score_function(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("the stand-in has no fused router")


fused_compute_score_for_moe_aux_loss = fused_topk_with_score_function
fused_moe_aux_loss = fused_topk_with_score_function
