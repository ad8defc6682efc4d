"""Auxiliary losses of routers: pure functions of logits and selections.

Legend: `n` candidates, `b` batch, `r` depths. `weights` are 1 for tokens and 0 for padding; None
means that there is no padding.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(values: Float[Tensor, "n b"], weights: Float[Tensor, "n b"] | None) -> Tensor:
    """Mean over the tokens that count; 0 if there are none."""
    if weights is None:
        return values.mean()
    # `where` and not a product, because a padding row may hold inf or nan.
    kept = torch.where(weights > 0, values, torch.zeros_like(values))
    return kept.sum() / weights.sum().clamp(min=1.0)


def sampling_loss(
    logits: Float[Tensor, "n b"],
    is_selected: Bool[Tensor, "n b"],
    weights: Float[Tensor, "n b"] | None = None,
) -> Tensor:
    """Binary cross entropy between σ(logit) and the selection, mean over candidates.

    It trains a causal predictor of a selection that saw the whole sequence (arXiv 2507.10524,
    section 2.2.1, and Raposo et al. 2024, section 3.5).
    """
    target = is_selected.to(logits.dtype)
    return masked_mean(
        F.binary_cross_entropy_with_logits(logits, target, reduction="none"), weights
    )


def sampling_accuracy(
    logits: Float[Tensor, "n b"],
    is_selected: Bool[Tensor, "n b"],
    weights: Float[Tensor, "n b"] | None = None,
) -> Tensor:
    """Share of candidates whose selection is predicted by σ(logit) > 0.5."""
    hits = ((logits > 0) == is_selected).to(torch.float32)
    return masked_mean(hits, weights)


def balancing_loss(
    probabilities: Float[Tensor, "n b r"],
    is_depth: Bool[Tensor, "n b r"],
    weights: Float[Tensor, "n b"] | None = None,
) -> Tensor:
    """`Σ_i P_i f_i` with `P_i` the mean probability of depth i and `f_i = N_r ·` its share.

    It is 1 if depths are chosen evenly (arXiv 2507.10524, section 2.2.1; Fedus et al. 2021).
    """
    num_depths = probabilities.shape[-1]
    total = 0.0
    for i in range(num_depths):
        share = masked_mean(is_depth[..., i].to(probabilities.dtype), weights)
        total = total + masked_mean(probabilities[..., i], weights) * share * num_depths
    return torch.as_tensor(total)


def z_loss(logits: Float[Tensor, "n b r"], weights: Float[Tensor, "n b"] | None = None) -> Tensor:
    """Mean of `logsumexp(logits)²`, which keeps logits small (Zoph et al. 2022)."""
    return masked_mean(torch.logsumexp(logits, dim=-1).square(), weights)
