"""Early exit for models that loop a fixed number of times: criteria instead of a trained router.

A token stops when a criterion on its own states is met. Nothing else changes: the exit is a `Router`,
so caches, depth-wise batching and the calibration of cache sizes work as with any other router. Models
that were trained without exits lose quality; measure it with the full forward pass.

Legend: `b` batch, `n` candidates of a step, `h` hidden, `c` numbers a criterion looks at, `v`
vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mor_layers.routers.base import Router
from mor_layers.selection import RoutingDecision
from mor_layers.settings import require_positive

ReadOut = Callable[[Tensor], Tensor]
"""Logits over the vocabulary from a state between steps."""


class Criterion(ABC):
    """Decides when a token has run enough steps."""

    numbers: ClassVar[int] = 1
    """Number of earlier observations that `is_met` needs; no token exits before they exist."""

    @abstractmethod
    def observe(self, hidden: Float[Tensor, "n b h"], read_out: ReadOut) -> Float[Tensor, "n b c"]:
        """The numbers that the criterion derives from a state."""

    def remember(
        self, seen: list[Float[Tensor, "n b c"]], new: Float[Tensor, "n b c"]
    ) -> list[Float[Tensor, "n b c"]]:
        """The observations that are kept for `is_met` and for later steps."""
        return [*seen, new][-self.numbers - 1 :]

    @abstractmethod
    def is_met(self, *observed: Float[Tensor, "n b c"]) -> Bool[Tensor, "n b"]:
        """Whether to stop, given `numbers` kept observations, earliest first, and the new one."""


@dataclass(frozen=True)
class Confidence(Criterion):
    """The most likely next token has at least this probability."""

    threshold: float
    """In (0, 1]."""
    numbers = 0

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"Confidence.threshold={self.threshold} must lie in (0, 1].")

    def observe(self, hidden: Tensor, read_out: ReadOut) -> Tensor:
        return read_out(hidden).float().softmax(dim=-1).amax(dim=-1, keepdim=True)

    def is_met(self, *observed: Tensor) -> Tensor:
        return observed[-1][..., 0] >= self.threshold


@dataclass(frozen=True)
class Divergence(Criterion):
    """The last step changed the prediction by a Kullback-Leibler divergence below this (nats)."""

    threshold: float
    """Above 0."""

    def __post_init__(self) -> None:
        require_positive("Divergence", threshold=self.threshold)

    def observe(self, hidden: Tensor, read_out: ReadOut) -> Tensor:
        return read_out(hidden).float().log_softmax(dim=-1)

    def is_met(self, *observed: Tensor) -> Tensor:
        before, now = observed
        return (now.exp() * (now - before)).sum(dim=-1) < self.threshold


@dataclass(frozen=True)
class Acceleration(Criterion):
    """The state's last change differs from the one before by less than this share of its length.

    After arXiv 2509.23314: a small second difference means that the loop continues in the same way
    and the state converges.
    """

    threshold: float
    """Above 0."""
    numbers = 2

    def __post_init__(self) -> None:
        require_positive("Acceleration", threshold=self.threshold)

    def observe(self, hidden: Tensor, read_out: ReadOut) -> Tensor:
        return hidden.float()

    def is_met(self, *observed: Tensor) -> Tensor:
        first, second, third = observed
        move, earlier = third - second, second - first
        return (move - earlier).norm(dim=-1) < self.threshold * move.norm(dim=-1)


@dataclass(frozen=True)
class ExitProbability(Criterion):
    """The probability of having exited by now, according to a gate at every step, exceeds this.

    With `λ_r = σ(w · H_r)`, the probability of exiting at step r, it is `1 - Π (1 - λ_r)`. The gate
    must have been trained with the model.
    """

    threshold: float
    """In (0, 1)."""
    gate: Float[Tensor, " h"]
    """Weights w."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"ExitProbability.threshold={self.threshold} must lie in (0, 1).")

    numbers = 0

    def observe(self, hidden: Tensor, read_out: ReadOut) -> Tensor:
        return F.logsigmoid(-(hidden.float() @ self.gate.float()))[..., None]  # log(1 - λ)

    def is_met(self, *observed: Tensor) -> Tensor:
        return -torch.expm1(observed[-1][..., 0]) > self.threshold

    def remember(self, seen: list[Tensor], new: Tensor) -> list[Tensor]:
        return [new + seen[0] if seen else new]  # log Π (1 - λ)


class EarlyExitRouter(Router):
    """Every token runs step 1, and continues until the criterion is met.

    Args:
        criterion: decides when to stop.
        read_out: turns a state into logits, as if it were the last state.
        num_recursions: largest number of steps.
    """

    def __init__(self, criterion: Criterion, read_out: ReadOut, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.criterion, self.read_out = criterion, read_out

    def logits(self, hidden: Tensor, step: int) -> Tensor | None:
        # The state that enters step r is the result of r steps. The one that enters the first step
        # matters only to criteria that compare states.
        if step == 0 and self.criterion.numbers == 0:
            return None
        return self.criterion.observe(hidden, self.read_out)

    def decide(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
    ) -> RoutingDecision:
        if logits is None:
            return previous.keep_valid()
        seen = [] if previous.plan is None else list(previous.plan.split(logits.shape[-1], dim=-1))
        seen = self.criterion.remember(seen, logits)
        noted = previous.with_plan(torch.cat(seen, dim=-1))
        if step == 0 or len(seen) <= self.criterion.numbers:
            return noted.keep_valid()
        return noted.keep_where(self.criterion.is_met(*seen).logical_not())
