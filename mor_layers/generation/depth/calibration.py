"""Thresholds from held-out text, and the dial that sets how much compute generation spends.

Training keeps a stated share of tokens at each step by looking at the whole sequence. Generation
decides token by token, by thresholds; `calibrate` sets them so that on held-out text each step keeps
the share that is wanted: the trained one, or less or more of it as the dial says. Weights stay as
they are.
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
    """What a calibration wanted, and what came of it on the text it used."""

    wanted: tuple[float, ...]
    """Share of all tokens at each step."""
    reached: tuple[float, ...]

    @property
    def mean_depth(self) -> float:
        """Steps that a token takes in the mean."""
        return sum(self.reached)


def turned(
    shares: tuple[float, ...], dial: float, compute: float | None = None
) -> tuple[float, ...]:
    """Shares that sum to `dial` times as much.

    The deeper a step, the more it gives or gains: shares are raised to a common power. Steps that
    everyone runs keep everyone as long as there is anything else to save.

    Args:
        shares: of all tokens, for each step; in (0, 1], never rising.
        dial: compute of the recursion, relative to `compute`. Above 0, and no more than all steps
            for all tokens.
        compute: steps of a token in the mean that dial 1 stands for. Default: what the shares mean.

    Raises:
        ValueError: a dial that no shares can reach.
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
    """Tune the routers so that, generating, each step keeps its share of tokens.

    Args:
        model: with token routing. What its routers compare with is changed in place.
        batches: token ids of held-out text, a few thousand tokens or more.
        dial: compute of the recursion, relative to `shares`; see `turned`. Of a model that was
            `deepened`, relative to the steps it was trained with.
        shares: of all tokens, for each step. Default: what the router's settings train for; where
            they do not say, as for token choice, what the model does now.

    Raises:
        ValueError: there is nothing to tune, no text, or a dial out of reach.
    """
    texts = list(batches)
    if not texts:
        raise ValueError("batches is empty. Give some held-out text.")
    if model.config.recursion is None or len(model.recursions) != 1:
        raise ValueError("the model routes no tokens, so there is nothing to calibrate.")
    (block,) = model.recursions
    assert isinstance(block, RecursionBlock)
    steps = block.router.num_recursions
    if shares is None:
        shares = model.config.recursion.router.capacity_factors_for(steps)
    is_training = model.training
    model.eval()
    try:
        shares = shares or _shares(model, texts, steps)
        router = model.config.recursion.router
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
    """Router logits of all candidates of a step, with the depths that generation gives them."""
    seen: list[Tensor] = []

    def note(routed: RoutedStep) -> None:
        if routed.step != step:
            return
        assert routed.logits is not None, "a router that is tuned compares logits"
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
