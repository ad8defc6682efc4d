"""A loss after every loop, weighted by a fixed prior over depths, and a penalty on the state's scale.

    L = Σ_r p_r · CE(read-out of H_{r+1}) + λ · mean over r and tokens of ‖H_{r+1}‖² / h

    uniform      p_r = 1 / N
    geometric    p_r ∝ (1 - q)^(r-1) · q        q: probability to stop after a loop
    poisson      p_r ∝ m^r / r!                 m: mean number of loops

The prior depends on no input. It shapes the states on the way, and a token's depth is decided
afterwards, by its confidence (`mor_layers.generation.with_early_exit`): such models exit as well as
those with learned gates, or better (arXiv 2607.20519). A loss behind a norm does not see the scale of
the state, which then grows from loop to loop into the thousands; the penalty keeps it small (arXiv
2606.24898).

Where we differ: the papers loop the whole stack. Layers after the recursion belong to the read-out here,
so that they learn to work on the state of every loop; in training they run once for each. Priors are cut
off at N and divided by their sum. 2606.24898 compares several penalties of the norm; ours is on the mean
square of a state's numbers. Tokens that exited keep their state, which counts again after later loops.

Legend: `b` batch, `s` sequence, `h` hidden, `r` loops, numbered from 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mor_layers.settings import check_types, require_choice

Prior = Literal["uniform", "geometric", "poisson"]


@dataclass(frozen=True)
class LoopLoss:
    """Settings of a loss after every loop."""

    prior: Prior = "uniform"
    """Weights of the loops: uniform, geometric or poisson."""
    rate: float | None = None
    """geometric: probability to stop after a loop, in (0, 1). poisson: mean number of loops, above 0.
    uniform: None."""
    scale_penalty: float = 0.0
    """λ, the weight of the mean square of the states' numbers. 0: no penalty."""

    def __post_init__(self) -> None:
        check_types(self)
        require_choice("LoopLoss", "prior", self.prior, get_args(Prior))
        highest = {"uniform": None, "geometric": 1.0, "poisson": math.inf}[self.prior]
        if highest is None and self.rate is not None:
            raise ValueError(
                f"LoopLoss.rate={self.rate} has no effect on a uniform prior. Leave it out."
            )
        if highest is not None and not (self.rate is not None and 0 < self.rate < highest):
            allowed = "in (0, 1)" if highest == 1.0 else "above 0 and finite"
            raise ValueError(
                f"LoopLoss.rate={self.rate} must be {allowed} with prior={self.prior!r}."
            )
        if not 0 <= self.scale_penalty < math.inf:
            raise ValueError(f"LoopLoss.scale_penalty={self.scale_penalty} must be 0 or more.")

    def weights(self, num_loops: int) -> tuple[float, ...]:
        """The weight of each loop's loss; they sum to 1."""
        loops, rate = range(1, num_loops + 1), self.rate or 0.0
        logs = {
            "uniform": [0.0 for _ in loops],
            "geometric": [(r - 1) * math.log1p(-rate) for r in loops] if rate < 1 else [],
            "poisson": [r * math.log(rate or 1.0) - math.lgamma(r + 1) for r in loops],
        }[self.prior]
        shares = [math.exp(log - max(logs)) for log in logs]
        return tuple(share / sum(shares) for share in shares)

    def penalty(
        self,
        states: Sequence[Float[Tensor, "s b h"]],
        is_padding: Bool[Tensor, "s b"] | None,
        count: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """The penalty of the states after each loop, times its weight; padding does not count.

        Args:
            count: number of tokens that the mean is over, also where this rank has a part of them.
        """
        squares = torch.stack([state.float().square().mean(dim=-1) for state in states])  # [r s b]
        if is_padding is not None:
            squares = squares.masked_fill(is_padding, 0)
        return self.scale_penalty * squares.sum() / (len(states) * count.clamp(min=1))


def over_loops(states: Sequence[Float[Tensor, "s b h"]]) -> Float[Tensor, "s rb h"]:
    """The states after each loop as one batch: loop by loop, each with all sequences."""
    return torch.cat(list(states), dim=1)


def expected_loss(losses: Float[Tensor, "rb s"], weights: Sequence[float]) -> Float[Tensor, "b s"]:
    """Losses of a batch that `over_loops` made, weighted by the prior: one for each token."""
    prior = losses.new_tensor(weights)
    return (losses.unflatten(0, (len(weights), -1)) * prior[:, None, None]).sum(dim=0)
