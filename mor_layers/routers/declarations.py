"""What a router declares about itself, so that the rest of the library needs no list of routers.

`RouterConfig` has a method or property for each declaration. The defaults are either safe for any
router or measured by running it, so a custom router does not have to declare anything.

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
    """One matrix of a router."""

    weights: int
    """Number of weights."""
    backward_products: int = 2
    """Number of matrix products in the backward pass: 1 if the input is detached, 0 if the output
    gets no gradient."""


@dataclass(frozen=True)
class StepNotes:
    """What the decision of a step holds for each selected token in addition to its position."""

    has_gates: bool = False
    """Whether the decision has gates."""
    plan_size: int = 0
    """Numbers per token in the router's plan (`RoutingDecision.plan`)."""

    @property
    def numbers(self) -> int:
        """Numbers per token in total."""
        return self.has_gates + self.plan_size


@dataclass(frozen=True)
class PublishedRouter:
    """How checkpoints of the published Mixture-of-Recursions code describe a router."""

    settings: Mapping[str, Any]
    """Entries of the section `mor` of the settings. The other sections are as for a model without a
    router."""
    layers: PublishedLayers
    """How the model's list of layers holds the shared ones. `every_pass`: one entry for each layer of
    each pass, as in a plain model. `every_step`: one entry for each step. `one_entry`: one entry for
    all of them."""
    names: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """For each tensor of the router's state dict: the index of its entry in the list of layers,
    counted from the first entry of the recursion, and its name within that entry."""
    buffers: Mapping[str, float] = field(default_factory=dict)
    """Buffers that published checkpoints do not hold, with their values at the end of training."""
    without_place: tuple[str, ...] = ()
    """Fields of the router's settings that the section `mor` cannot express."""


def measured_scorers(router: Router, hidden_size: int) -> tuple[tuple[ScorerMatrix, ...], ...]:
    """For each step, the matrices that `router.logits` multiplies a token by.

    `logits` runs on one token on the meta device, which propagates shapes without computing. The
    result has one entry per number of backward products, not one per matrix.

    Args:
        router: a router that was built on the meta device.

    Raises:
        ValueError: `logits` reads values of tensors, which do not exist on the meta device.
    """
    return tuple(_measured(router, hidden_size, step) for step in range(router.num_recursions))


def _measured(router: Router, hidden_size: int, step: int) -> tuple[ScorerMatrix, ...]:
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, and seldom needed

    # The caller, such as a planner, may have disabled gradients, but their cost must be counted.
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
    # The backward pass has two products for each matrix, one, or none. `twice`, `once` and the rest
    # are the numbers of weights in the three cases.
    twice = max(0, met_again - met)
    once = met_again - 2 * twice
    parts = ((twice, 2), (once, 1), (met - twice - once, 0))
    return tuple(ScorerMatrix(weights, times) for weights, times in parts if weights)


def observed_notes(config: RouterConfig, num_recursions: int) -> tuple[StepNotes, ...]:
    """For each step, what a router's decisions hold for each token, found by running it once."""
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
