"""RecursionBlock: one stack of layers, run several times, as deep as each token needs.

THE MAIN PATH, read this first: route -> select -> block -> combine, once a step.

Legend: `b` batch, `s` sequence, `n` candidates of a step, `k` tokens that run it, `h` hidden.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mor_layers.attention import KVPolicy, StepContext, begin_step
from mor_layers.routers.base import Router
from mor_layers.routing import LocalPlacement, Placement, RoutingDecision, Tokens


class RecursionLayers(Protocol):
    """What a RecursionBlock wraps: a module that maps hidden states to hidden states.

    Its residual stream is inside: the result is a full hidden state, not a delta. The context says
    which tokens the rows are (`context.tokens`: positions, documents, padding), which step runs,
    and what attention may see; a module without attention can ignore it. The wrapper assumes
    nothing about causality. `arguments` are those given to `RecursionBlock.forward`.
    """

    def __call__(
        self, hidden: Float[Tensor, "k b h"], context: StepContext, **arguments: Any
    ) -> Float[Tensor, "k b h"]: ...


@dataclass(frozen=True)
class RecursionOutput:
    """What a recursion gives back."""

    hidden: Float[Tensor, "s b h"]
    """Final hidden states of all tokens."""
    decisions: tuple[RoutingDecision, ...]
    """Who ran each step."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses by name, summed over steps, multiplied by their coefficients."""
        total: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        for decision in self.decisions:
            for name, loss in decision.losses.items():
                total[name] = total[name].to(loss.device) + loss
        return dict(total)

    @property
    def depths(self) -> Int[Tensor, "s b"]:
        """Number of steps each token took."""
        tokens = self.decisions[0].tokens
        size = (tokens.sequence_length, tokens.shape[1])
        depths = torch.zeros(size, dtype=torch.long, device=tokens.positions.device)
        for tokens in (decision.tokens for decision in self.decisions):
            ran = torch.ones_like(tokens.positions)
            if tokens.is_padding is not None:
                ran = tokens.is_padding.logical_not().long()
            depths = depths.scatter_add(0, tokens.positions, ran)
        return depths


class RecursionBlock(nn.Module):
    """Runs `layers` `router.num_recursions` times on ever fewer tokens.

    Source: Bae et al. 2025 (arXiv 2507.10524), section 2.2.

    Args:
        layers: the shared stack, see `RecursionLayers`; held once.
        router: who goes on.
        kv_policy: which keys and values attention sees at later steps.
        placement: where rows of hidden states live; all here by default.
        recompute: recompute the layers in the backward pass, step by step, instead of keeping
            their activations.
    """

    def __init__(
        self,
        layers: nn.Module,
        router: Router,
        kv_policy: KVPolicy = "recursion_wise",
        placement: Placement | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.router = router
        self.kv_policy: KVPolicy = kv_policy
        self.placement: Placement = placement or LocalPlacement()
        self.recompute = recompute

    def forward(
        self,
        hidden: Float[Tensor, "s b h"],
        tokens: Tokens | None = None,
        causal_routing: bool = False,
        **arguments: Any,
    ) -> RecursionOutput:
        """Run the recursion.

        Args:
            hidden: states that enter it, sequence first.
            tokens: positions, documents and padding; by default one document a sequence and no
                padding.
            causal_routing: let no token's depth depend on later tokens, as generation needs.
            arguments: handed to the layers as they are.
        """
        if tokens is None:
            tokens = Tokens.whole_sequence(*hidden.shape[:2], device=hidden.device)
        candidates, origin = hidden, hidden
        decision, context = RoutingDecision.everything(tokens), None
        steps: list[tuple[Tensor, RoutingDecision]] = []
        for step in range(self.router.num_recursions):
            decision = self._route(candidates, step, decision, causal_routing)
            selected = self.placement.select(candidates, decision)
            if self.router.combines_with_origin:
                origin = self.placement.select(origin, decision)
            context = begin_step(self.kv_policy, step, decision.tokens, context)
            output = self._run_layers(selected, context, arguments)
            updated = self._combine(step, selected, output, decision, origin)
            steps.append((candidates, decision))
            candidates = updated
        # Selections nest, so states are put back inside out.
        hidden = candidates
        for outer, nested in reversed(steps):
            hidden = self.placement.write_back(outer, hidden, nested)
        return RecursionOutput(hidden, tuple(taken for _, taken in steps))

    def _route(
        self, candidates: Tensor, step: int, previous: RoutingDecision, causal: bool
    ) -> RoutingDecision:
        logits = self.router.logits(candidates, step)
        if logits is not None:
            logits = self.placement.gather(logits, previous.tokens.shape[0])
        return self.router.decide(logits, step, previous, causal)

    def _run_layers(
        self, selected: Tensor, context: StepContext, arguments: dict[str, Any]
    ) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return self.layers(selected, context, **arguments)
        run = partial(self.layers, **arguments)
        return cast(Tensor, checkpoint(run, selected, context, use_reentrant=False))

    def _combine(
        self, step: int, selected: Tensor, output: Tensor, decision: RoutingDecision, origin: Tensor
    ) -> Tensor:
        local = self.placement.shard(decision)
        updated = self.router.combine(
            step, selected, output, local, origin if self.router.combines_with_origin else None
        )
        if local.tokens.is_padding is None:
            return updated
        return torch.where(local.tokens.is_padding[..., None], selected, updated)
