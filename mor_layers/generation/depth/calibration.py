"""Calibration: sets routing thresholds on held-out text, for a given compute budget of generation.

In training a router sees the whole sequence and keeps a given share of its tokens at each step.
Generation decides token by token, by comparing with thresholds. `calibrate` sets the thresholds such
that each step keeps a target share on held-out text: the trained share, or a smaller or larger one
if `dial` is not 1. The weights do not change.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mor_layers.models import MoRTransformer
from mor_layers.recursion import RecursionBlock, RoutedStep
from mor_layers.routers import Deepened, FixedDepth


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration. Steps of several recursions are listed one after another."""

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
    """Tune the routers' thresholds so that each step keeps a target share of tokens in generation.

    Of several recursions, those of fixed depth stay as they are, and the others are tuned in order,
    because what a later one sees depends on what the earlier ones did.

    Args:
        model: a model that routes tokens. The thresholds of its routers are changed in place.
        batches: token ids of held-out text, a few thousand tokens or more.
        dial: compute of each recursion relative to `shares`, see `turned`. For a model made by
            `deepened`, relative to the shares of the steps that it was trained with.
        shares: share of all tokens at each step at `dial=1`, of several recursions for the steps of one
            after another. Default: the shares of the routers' settings. If these determine none, as for
            token choice, the shares that the model currently has on this text.

    Raises:
        ValueError: no router has thresholds, there is no text, the dial is out of range, or `shares` has
            not one entry for each step.
    """
    texts = list(batches)
    if not texts:
        raise ValueError("batches is empty. Give some held-out text.")
    recursions = model.config.recursions
    if any(recursion.routes_by_layer for recursion in recursions):
        raise ValueError(
            "calibration sets the thresholds of one router, but here each layer has its own. Train "
            "with a larger predictor_coefficient, by which they foresee their choices better."
        )
    # Where layers repeat one by one, there are several blocks, and all tokens run all steps of each.
    routed = {
        index: own[0]
        for index, (recursion, own) in enumerate(zip(recursions, model.blocks, strict=False))
        if len(own) == 1 and (len(recursions) == 1 or not isinstance(recursion.router, FixedDepth))
    }
    if not routed:
        raise ValueError("the model routes no tokens, so there is nothing to calibrate.")
    targets = _divided(shares, [recursion.num_recursions for recursion in recursions])
    is_training = model.training
    model.eval()
    try:
        for index, recursion in enumerate(recursions):
            router, steps = recursion.router, recursion.num_recursions
            if index not in routed:
                targets[index] = (1.0,) * steps
                continue
            block = routed[index]
            own = targets[index] or router.capacity_factors_for(steps)
            own = own or _shares(model, texts)[index]
            trained = steps - router.extra_steps if isinstance(router, Deepened) else steps
            wanted = turned(own, dial, sum(own[:trained]))
            block.router.tune(wanted, partial(_logits, model, block, texts))
            targets[index] = wanted
        reached = _shares(model, texts)
    finally:
        model.train(is_training)
    return Calibration(
        tuple(share for own in targets if own for share in own),
        tuple(share for own in reached for share in own),
    )


def _divided(
    shares: tuple[float, ...] | None, steps: Sequence[int]
) -> list[tuple[float, ...] | None]:
    """The shares of each recursion's steps, or None for each.

    Raises:
        ValueError: there is not one share for each step.
    """
    if shares is None:
        return [None] * len(steps)
    if len(shares) != sum(steps):
        raise ValueError(
            f"shares={shares} has {len(shares)} entries, but the model has {sum(steps)} steps. Give one "
            "for each, of several recursions one after another."
        )
    ends = list(accumulate(steps))
    return [shares[end - count : end] for end, count in zip(ends, steps, strict=True)]


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
def _shares(model: MoRTransformer, texts: list[Tensor]) -> list[tuple[float, ...]]:
    """The measured share of all tokens at each step of each recursion."""
    outputs = [model(ids, causal_routing=True) for ids in texts]
    found, first = [], 0
    for recursion, blocks in zip(model.config.recursions, model.blocks, strict=True):
        depths = torch.cat([output.recursions[first].depths.flatten() for output in outputs])
        steps = range(recursion.num_recursions)
        found.append(tuple(float((depths > step).float().mean()) for step in steps))
        first += len(blocks)
    return found
