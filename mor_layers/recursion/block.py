"""RecursionBlock: one stack of layers, run several times, as deep as each token needs.

THE MAIN PATH, read this first: route -> select -> block -> combine, once a step.

Legend: `b` batch, `s` sequence, `n` candidates of a step, `k` tokens that run it, `h` hidden,
`r` steps, `j` layers of the block, `e` experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mor_layers.recursion.expert_use import ExpertUse
from mor_layers.recursion.kv_policies import Exited, KVPolicy, StepContext, begin_step
from mor_layers.recursion.observer import RoutedStep, RoutingObserver
from mor_layers.recursion.step_input import StepInput
from mor_layers.routers import Router
from mor_layers.selection import LocalPlacement, Placement, RoutingDecision, Tokens


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
    expert_use: tuple[dict[int, ExpertUse], ...] = ()
    """What the experts of each layer did at each step; empty without a mixture of experts."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses by name, summed over steps, multiplied by their coefficients."""
        uses = (use for step in self.expert_use for use in step.values())
        return summed([*(d.losses for d in self.decisions), *(use.losses for use in uses)])

    @property
    def observations(self) -> dict[str, Tensor]:
        """What the router observed for `Router.adjust`, by name."""
        return summed([decision.observations for decision in self.decisions])

    @property
    def expert_load(self) -> Float[Tensor, "r j e"]:
        """Tokens that each expert computed, by step and layer."""
        return self._cells("load")

    @property
    def expert_drops(self) -> Float[Tensor, "r j e"]:
        """Tokens that each expert turned away, by step and layer."""
        return self._cells("dropped")

    def _cells(self, name: str) -> Tensor:
        if not any(self.expert_use):
            raise ValueError("the layers of this recursion have no experts. Set DecoderConfig.moe.")
        steps = ([getattr(use, name) for use in step.values()] for step in self.expert_use)
        return torch.stack([torch.stack(layers) for layers in steps])

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


def summed(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sums by name."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


class RecursionBlock(nn.Module):
    """Runs `layers` `router.num_recursions` times on ever fewer tokens.

    Source: Bae et al. 2025 (arXiv 2507.10524), section 2.2.

    `route`, `select`, `run_layers` and `combine` are the parts of one step. What must run steps
    otherwise than `forward` does (a pipeline stage, an engine that generates) calls these, so that
    each of them is written once.

    Args:
        layers: the shared stack, see `RecursionLayers`; held once.
        router: who goes on.
        kv_policy: which keys and values attention sees at later steps.
        placement: where rows of hidden states live; all here by default.
        recompute: recompute the layers in the backward pass, step by step, instead of keeping
            their activations.
        step_input: what is added to the states that enter the layers.
    """

    _observers: tuple[RoutingObserver, ...] = ()

    def __init__(
        self,
        layers: nn.Module,
        router: Router,
        kv_policy: KVPolicy = "recursion_wise",
        placement: Placement | None = None,
        recompute: bool = False,
        step_input: StepInput | None = None,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.router = router
        self.kv_policy: KVPolicy = kv_policy
        self.placement: Placement = placement or LocalPlacement()
        self.recompute = recompute
        self.step_input = step_input

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
        expert_use = []
        for step in range(self.router.num_recursions):
            previous = decision
            decision = self.route(candidates, step, previous, causal_routing)
            selected = self.select(candidates, decision)
            if self.needs_origin:
                origin = self.select(origin, decision)
            exited = self._exited(candidates, previous, decision)
            context = begin_step(self.kv_policy, step, decision.tokens, context, exited)
            output = self.run_layers(self.enter(step, selected, origin), context, **arguments)
            updated = self.combine(step, selected, output, decision, origin)
            steps.append((candidates, decision))
            expert_use.append(context.expert_use)
            candidates = updated
        # Selections nest, so states are put back inside out.
        hidden = candidates
        for outer, nested in reversed(steps):
            hidden = self.placement.write_back(outer, hidden, nested)
        return RecursionOutput(hidden, tuple(taken for _, taken in steps), tuple(expert_use))

    def route(
        self,
        candidates: Float[Tensor, "n b h"],
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
        assess: bool = True,
    ) -> RoutingDecision:
        """Decide which of a step's candidates run it.

        Args:
            candidates: states of the tokens of the previous decision, those that live here.
            step: 0-based recursion step.
            previous: the candidates, and what was planned for them.
            causal: let no token's fate depend on later tokens, as generation needs.
            assess: add losses, metrics and observations to the decision. Generation does without.
        """
        logits = self.router.logits(candidates, step)
        if logits is not None:
            logits = self.placement.gather(logits, previous.tokens.shape[0])
        decision = self.router.decide(logits, step, previous, causal)
        if assess:
            decision = self.router.assess(logits, step, previous, decision)
        for observe in self._observers:
            observe(RoutedStep(step, logits, previous, decision, causal))
        return decision

    def select(
        self, candidates: Float[Tensor, "n b h"], decision: RoutingDecision
    ) -> Float[Tensor, "k b h"]:
        """The rows of the tokens that run the step."""
        return self.placement.select(candidates, decision)

    @property
    def needs_origin(self) -> bool:
        """Whether the states that entered the recursion must be at hand at later steps."""
        injects = self.step_input is not None and self.step_input.injects
        return self.router.combines_with_origin or injects

    def enter(self, step: int, selected: Tensor, origin: Tensor | None) -> Tensor:
        """The selected tokens' states as the layers get them."""
        return selected if self.step_input is None else self.step_input(step, selected, origin)

    def run_layers(
        self, entering: Float[Tensor, "k b h"], context: StepContext, **arguments: Any
    ) -> Float[Tensor, "k b h"]:
        """The shared layers on the tokens that run the step.

        Args:
            entering: what `enter` gave.
            context: of the step, see `begin_step`.
            arguments: handed to the layers as they are.
        """
        if not (self.recompute and torch.is_grad_enabled()):
            return self.layers(entering, context, **arguments)
        run = partial(self.layers, **arguments)
        return cast(Tensor, checkpoint(run, entering, context, use_reentrant=False))

    def combine(
        self,
        step: int,
        selected: Float[Tensor, "k b h"],
        output: Float[Tensor, "k b h"],
        decision: RoutingDecision,
        origin: Float[Tensor, "k b h"] | None,
    ) -> Float[Tensor, "k b h"]:
        """New states of the tokens that ran the step; padding slots keep theirs.

        Args:
            selected: what `select` gave.
            output: what `run_layers` gave.
            origin: states that entered the recursion, of the same rows, where `needs_origin`.
        """
        local = self.placement.shard(decision)
        updated = self.router.combine(
            step, selected, output, local, origin if self.router.combines_with_origin else None
        )
        if local.tokens.is_padding is None:
            return updated
        return torch.where(local.tokens.is_padding[..., None], selected, updated)

    @contextmanager
    def observed(self, observer: RoutingObserver) -> Iterator[None]:
        """Within it, `observer` is told of each step that is routed, in training and generation.

        Several may watch at once. They see tensors as they are, with their graphs.
        """
        self._observers = (*self._observers, observer)
        try:
            yield
        finally:
            watching = list(self._observers)
            watching.remove(observer)
            self._observers = tuple(watching)

    def _exited(
        self, candidates: Tensor, previous: RoutingDecision, decision: RoutingDecision
    ) -> Exited | None:
        rest = previous.rest(decision) if self.kv_policy == "exit_state" else None
        if rest is None:
            return None
        return Exited(rest.tokens, self.select(candidates, rest))
