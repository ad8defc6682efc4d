"""Calibration: sets routing thresholds on held-out text, for a given compute budget of generation.

In training a router sees the whole sequence and keeps a given share of its tokens at each step.
Generation decides token by token, by comparing with thresholds. `calibrate` sets the thresholds such
that each step keeps a target share on held-out text: the trained share, or a smaller or larger one
if `dial` is not 1. The weights do not change.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mor_layers.models import MoRTransformer
from mor_layers.recursion import RecursionBlock, RoutedStep
from mor_layers.routers import Deepened


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration."""

    wanted: tuple[float, ...]
    """Target share of all tokens at each step."""
    reached: tuple[float, ...]
    """Measured share of all tokens at each step, on the text that was used."""

    @property
    def mean_depth(self) -> float:
        """Mean number of steps of a token."""
        return sum(self.reached)


def turned(
    shares: tuple[float, ...], dial: float, compute: float | None = None
) -> tuple[float, ...]:
    """Adjust `shares` such that their sum is `dial * compute`.

    All shares are raised to a common power, so deeper steps change more. Steps that all tokens run
    keep all tokens, unless the target is below the number of such steps.

    Args:
        shares: share of all tokens at each step, in (0, 1], never increasing.
        dial: compute of the recursion relative to `compute`. Above 0, and at most the value at which
            all tokens run all steps.
        compute: mean number of steps of a token at `dial=1`. Default: the sum of `shares`.

    Raises:
        ValueError: no shares can reach the dial.
    """
    compute = sum(shares) if compute is None else compute
    target, most = dial * compute, len(shares)
    if not 0 < target <= most + 1e-9:
        raise ValueError(
            f"dial={dial} must be above 0 and at most {most / compute:.4g}, where every token "
            f"runs all {most} steps."
        )
    if target == sum(shares):
        return shares
    always = sum(share == 1.0 for share in shares)
    if target <= always:
        return tuple(target / always if share == 1.0 else 0.0 for share in shares)
    low, high = 0.0, 1.0
    while sum(share**high for share in shares) > target:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(s**middle for s in shares) > target else (low, middle)
    return tuple(share**high for share in shares)


def calibrate(
    model: MoRTransformer,
    batches: Iterable[Int[Tensor, "b s"]],
    dial: float = 1.0,
    shares: tuple[float, ...] | None = None,
) -> Calibration:
    """Tune the router's thresholds so that each step keeps a target share of tokens in generation.

    Args:
        model: a model that routes tokens. The thresholds of its router are changed in place.
        batches: token ids of held-out text, a few thousand tokens or more.
        dial: compute of the recursion relative to `shares`, see `turned`. For a model made by
            `deepened`, relative to the shares of the steps that it was trained with.
        shares: share of all tokens at each step at `dial=1`. Default: the shares of the router's
            settings. If these determine none, as for token choice, the shares that the model
            currently has on this text.

    Raises:
        ValueError: the router has no thresholds, there is no text, or the dial is out of range.
    """
    texts = list(batches)
    if not texts:
        raise ValueError("batches is empty. Give some held-out text.")
    recursion = model.config.only_recursion("calibration")
    if recursion is None or len(model.recursions) != 1:
        if recursion is not None and recursion.routes_by_layer:
            raise ValueError(
                "calibration sets the thresholds of one router, but here each layer has its own. Train "
                "with a larger predictor_coefficient, by which they foresee their choices better."
            )
        raise ValueError("the model routes no tokens, so there is nothing to calibrate.")
    (block,) = model.recursions
    assert isinstance(block, RecursionBlock)
    steps = block.router.num_recursions
    if shares is None:
        shares = recursion.router.capacity_factors_for(steps)
    is_training = model.training
    model.eval()
    try:
        shares = shares or _shares(model, texts, steps)
        router = recursion.router
        trained = steps - router.extra_steps if isinstance(router, Deepened) else steps
        wanted = turned(shares, dial, sum(shares[:trained]))
        block.router.tune(wanted, lambda step: _logits(model, block, texts, step))
        return Calibration(wanted, _shares(model, texts, steps))
    finally:
        model.train(is_training)


@torch.no_grad()
def _logits(
    model: MoRTransformer, block: RecursionBlock, texts: list[Tensor], step: int
) -> Float[Tensor, "t c"]:
    """Router logits of all candidates of a step, routed as in generation."""
    seen: list[Tensor] = []

    def note(routed: RoutedStep) -> None:
        if routed.step != step:
            return
        assert routed.logits is not None, "a router with thresholds has logits"
        padding = routed.previous.tokens.is_padding
        logits = routed.logits
        seen.append(logits.flatten(0, 1) if padding is None else logits[~padding])

    with block.observed(note):
        for ids in texts:
            model(ids, causal_routing=True)
    return torch.cat(seen)


@torch.no_grad()
def _shares(model: MoRTransformer, texts: list[Tensor], steps: int) -> tuple[float, ...]:
    depths = torch.cat([model(ids, causal_routing=True).depths.flatten() for ids in texts])
    return tuple(float((depths > step).float().mean()) for step in range(steps))
