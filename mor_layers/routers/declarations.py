"""What a router declares of itself, so that nothing else needs a list of routers.

`RouterConfig` has a method or property for each declaration. Their defaults either are safe for any
router or follow from a trial of it, so that a router of one's own need declare nothing.

Legend: `n` candidates of a step, `b` batch, `h` hidden, `c` logits a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from mor_layers.selection import RoutingDecision, Tokens

if TYPE_CHECKING:  # `base` needs these classes for its declarations
    from mor_layers.routers.base import Router, RouterConfig

PublishedLayers = Literal["every_pass", "every_step", "one_entry"]


@dataclass(frozen=True)
class ScorerMatrix:
    """One matrix of a router, of so many weights."""

    weights: int
    backward_products: int = 2
    """Its products in the backward pass: 1 if its input is detached, 0 if no gradient arrives."""


@dataclass(frozen=True)
class StepNotes:
    """What the decision of a step says of each selected token beside its position."""

    has_gates: bool = False
    """Whether the decision has gates."""
    plan_size: int = 0
    """Numbers that the router planned per token (`RoutingDecision.plan`)."""

    @property
    def numbers(self) -> int:
        """Numbers per token."""
        return self.has_gates + self.plan_size


@dataclass(frozen=True)
class PublishedRouter:
    """A router's place in checkpoints of the published Mixture-of-Recursions code."""

    settings: Mapping[str, Any]
    """Entries of the section `mor` of its settings; the rest is as without a router."""
    layers: PublishedLayers
    """How the shared layers are listed: one by one for every pass through them, as in a plain model,
    with an entry of the model's layers for every step, or all of them in one entry."""
    names: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """By the name of a tensor in the router's state dict: its entry among the model's layers, counted
    from the recursion's first, and its name there."""
    buffers: Mapping[str, float] = field(default_factory=dict)
    """Buffers that no checkpoint holds, as they are at the end of training."""
    without_place: tuple[str, ...] = ()
    """Fields of the settings whose values the section `mor` cannot express."""


def measured_scorers(router: Router, hidden_size: int) -> tuple[tuple[ScorerMatrix, ...], ...]:
    """The matrices that `router.logits` multiplies a token with, at each step.

    `logits` runs on one token on the meta device, where shapes are followed and nothing is computed.
    Products are told apart by how often they recur in the backward pass, not matrix by matrix.

    Args:
        router: one that was built on the meta device.

    Raises:
        ValueError: `logits` looks at the values of tensors, which have none there.
    """
    return tuple(_measured(router, hidden_size, step) for step in range(router.num_recursions))


def _measured(router: Router, hidden_size: int, step: int) -> tuple[ScorerMatrix, ...]:
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, and seldom needed

    # Gradients are counted even where whoever asks, such as a planner, works without them.
    with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
        token = torch.empty(1, 1, hidden_size, requires_grad=True)  # [n b h]
        try:
            with FlopCounterMode(display=False) as counter:
                logits = router.logits(token, step)
                forward = counter.get_total_flops()
                if logits is not None and logits.requires_grad:
                    logits.sum().backward()
                both = counter.get_total_flops()
        except (NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"the cost of {type(router).__name__} cannot be measured, because its `logits` does "
                f"not run on the meta device ({error}). Declare it: give its RouterConfig a method "
                "`scorer_shapes`."
            ) from error
    met, met_again = forward // 2, (both - forward) // 2  # a weight costs 2 FLOPs per token
    # Of each matrix the backward pass has two products, one, or none.
    twice = max(0, met_again - met)
    once = met_again - 2 * twice
    parts = ((twice, 2), (once, 1), (met - twice - once, 0))
    return tuple(ScorerMatrix(weights, times) for weights, times in parts if weights)


def observed_notes(config: RouterConfig, num_recursions: int) -> tuple[StepNotes, ...]:
    """What such a router's decisions about a few tokens say of them, at each step."""
    size, length, notes = 4, 8, []
    with torch.random.fork_rng(devices=()), torch.no_grad(), torch.device("cpu"):
        router = config.build(size, num_recursions)
        candidates = torch.zeros(length, 1, size)
        decision = RoutingDecision.everything(Tokens.whole_sequence(length, 1))
        for step in range(num_recursions):
            decision = router.decide(router.logits(candidates, step), step, decision)
            candidates = candidates[: decision.tokens.shape[0]]
            planned = 0 if decision.plan is None else decision.plan.shape[-1]
            notes.append(StepNotes(decision.gates is not None, planned))
    return tuple(notes)
