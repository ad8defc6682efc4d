"""RecursionBlock: one stack of layers that runs several times, as often as each token needs.

This is the main path; read it first: route -> select -> block -> combine, once per step.

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

from mor_layers.profiling import named, named_range
from mor_layers.recursion.expert_use import ExpertUse
from mor_layers.recursion.kv_policies import Exited, KVPolicy, StepContext, begin_step
from mor_layers.recursion.observer import RoutedStep, RoutingObserver
from mor_layers.recursion.step_input import StepInput
from mor_layers.recursion.truncation import cut
from mor_layers.routers import LoopState, Router
from mor_layers.selection import LocalPlacement, Placement, RoutingDecision, Tokens
from mor_layers.selection.fused import RMSNormWeight, add_gated, fuses, take_and_norm


class RecursionLayers(Protocol):
    """What a RecursionBlock wraps: a module that maps hidden states to hidden states.

    The module contains its residual stream, so its result is a full hidden state and not a delta.
    The context says which tokens the rows are (`context.tokens`: positions, documents, padding),
    which step runs, and what attention may see. A module without attention can ignore it. The
    block assumes nothing about causality. `arguments` are those of `RecursionBlock.forward`.

    A module may have a method `entry_norm(step)`, which returns the `RMSNormWeight` that it applies to
    its input first, or None. It then takes an argument `normed`: None, or the result of that norm.
    """

    def __call__(
        self, hidden: Float[Tensor, "k b h"], context: StepContext, **arguments: Any
    ) -> Float[Tensor, "k b h"]: ...


def entry_norm_of(layers: nn.Module, step: int) -> RMSNormWeight | None:
    """The norm that layers begin with at a step, if they tell (see `RecursionLayers`)."""
    entry_norm = getattr(layers, "entry_norm", None)
    return None if entry_norm is None else entry_norm(step)


@dataclass(frozen=True)
class RecursionOutput:
    """The result of a recursion."""

    hidden: Float[Tensor, "s b h"]
    """Final hidden states of all tokens."""
    decisions: tuple[RoutingDecision, ...]
    """The routing decision of each step."""
    expert_use: tuple[dict[int, ExpertUse], ...] = ()
    """What the experts of each layer did at each step. Empty without a mixture of experts."""
    states: tuple[Float[Tensor, "s b h"], ...] = ()
    """Hidden states of all tokens after each step, the last of which is `hidden`. Empty unless asked
    for."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses by name, multiplied by their coefficients and summed over steps."""
        uses = (use for step in self.expert_use for use in step.values())
        return summed([*(d.losses for d in self.decisions), *(use.losses for use in uses)])

    @property
    def observations(self) -> dict[str, Tensor]:
        """Observations for `Router.adjust` by name, summed over steps."""
        return summed([decision.observations for decision in self.decisions])

    @property
    def expert_load(self) -> Float[Tensor, "r j e"]:
        """Number of tokens that each expert computed, by step and layer."""
        return self._cells("load")

    @property
    def expert_drops(self) -> Float[Tensor, "r j e"]:
        """Number of tokens that each expert dropped, by step and layer."""
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
    """The sum of the values that share a name."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


class RecursionBlock(nn.Module):
    """Runs `layers` `router.num_recursions` times, each time on the tokens that still continue.

    Source: Bae et al. 2025 (arXiv 2507.10524), section 2.2.

    `route`, `select`, `run_layers` and `combine` are the parts of one step. Code that runs steps in
    another order than `forward` (a pipeline stage, the generation engine) calls these methods, so
    that each part exists once.

    Args:
        layers: the shared stack, see `RecursionLayers`. There is one copy of it.
        router: decides which tokens continue to the next step.
        kv_policy: which keys and values attention sees at later steps.
        placement: where the rows of hidden states are stored. By default they are all on this rank.
        recompute: recompute the layers step by step in the backward pass instead of keeping
            their activations.
        step_input: what is added to the states that enter the layers.
        streams: the residual streams that states consist of between steps; None: a single one.
        history: the earlier states that tokens carry between steps; None: none. Not with streams.
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
        streams: LoopState | None = None,
        history: LoopState | None = None,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.router = router
        self.kv_policy: KVPolicy = kv_policy
        self.placement: Placement = placement or LocalPlacement()
        self.recompute = recompute
        self.step_input = step_input
        assert streams is None or history is None
        self.streams, self.history = streams, history

    def forward(
        self,
        hidden: Float[Tensor, "s b h"],
        tokens: Tokens | None = None,
        causal_routing: bool = False,
        keeps_states: bool = False,
        plan: Float[Tensor, "s b p"] | None = None,
        **arguments: Any,
    ) -> RecursionOutput:
        """Run the recursion.

        Args:
            hidden: the states that enter the recursion, sequence first.
            tokens: positions, documents and padding. By default each sequence is one document
                without padding.
            causal_routing: do not let a token's depth depend on later tokens. Generation needs this.
            keeps_states: return the states after every step, which a loss after every loop needs.
            plan: what is planned for the tokens before the first step, which some routers read.
            arguments: passed on to the layers.
        """
        if tokens is None:
            tokens = Tokens.whole_sequence(*hidden.shape[:2], device=hidden.device)
        candidates = origin = self.begin(hidden)
        first_trained, has_gradients = self.router.first_trained_step, torch.is_grad_enabled()
        decision, context = RoutingDecision.everything(tokens), None
        if plan is not None:
            decision = decision.with_plan(plan)
        steps: list[tuple[Tensor, RoutingDecision]] = []
        decisions, expert_use, states = [], [], []
        num_steps = self.router.num_recursions
        for step in range(num_steps):
            previous = decision
            if step and step == first_trained:
                candidates = cut(candidates, self)
            trains = has_gradients and step >= first_trained
            with named_range(f"mor/step {step + 1}"), torch.set_grad_enabled(trains):
                decision = self.route(candidates, step, previous, causal_routing)
                selected, normed = self.select_and_norm(candidates, decision, step)
                if self.needs_origin:
                    with torch.set_grad_enabled(has_gradients):
                        origin = self.select(origin, decision)
                exited = self._exited(candidates, previous, decision)
                context = begin_step(self.kv_policy, step, decision.tokens, context, exited)
                entering = self.enter(step, selected, origin)
                output = self.run_layers(entering, context, **normed, **arguments)
                if step == num_steps - 1 and self.adds_in_place(candidates, output, decision):
                    updated = self.add_in_place(candidates, output, decision)
                else:
                    updated = self.combine(step, selected, output, decision, origin)
                    steps.append((candidates, decision))
            decisions.append(decision)
            expert_use.append(context.expert_use)
            candidates = updated
            if keeps_states:
                states.append(self.end(self._of_all_tokens(candidates, steps)))
        hidden = states[-1] if states else self.end(self._of_all_tokens(candidates, steps))
        return RecursionOutput(hidden, tuple(decisions), tuple(expert_use), tuple(states))

    @named("mor/route")
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
            candidates: states of those of the previous decision's tokens that are stored on this
                rank.
            step: 0-based recursion step.
            previous: the candidates, and what was planned for them.
            causal: do not let a token's depth depend on later tokens. Generation needs this.
            assess: add losses, metrics and observations to the decision. Generation does not need
                them.
        """
        logits = self.router.logits(self.end(candidates), step)
        if logits is not None:
            logits = self.placement.gather(logits, previous.tokens.shape[0])
        decision = self.router.decide(logits, step, previous, causal)
        if assess:
            decision = self.router.assess(logits, step, previous, decision)
        for observe in self._observers:
            observe(RoutedStep(step, logits, previous, decision, causal))
        return decision

    @named("mor/select")
    def select(
        self, candidates: Float[Tensor, "n b h"], decision: RoutingDecision
    ) -> Float[Tensor, "k b h"]:
        """The states of the tokens that run the step."""
        return self.placement.select(candidates, decision)

    def select_and_norm(
        self, candidates: Float[Tensor, "n b h"], decision: RoutingDecision, step: int
    ) -> tuple[Float[Tensor, "k b h"], dict[str, Tensor]]:
        """The result of `select`, and what `layers` get beside it: `normed`, if one kernel selects and
        computes the norm that the layers begin with.
        """
        norm = None
        is_plain = isinstance(self.placement, LocalPlacement) and not self.enters_changed
        # Under `exit_state` the norm is that of more rows. Recomputation should not keep the result.
        if is_plain and self.kv_policy != "exit_state" and not self.recompute:
            norm = entry_norm_of(self.layers, step)
        if (
            norm is None
            or decision.rows is None
            or norm.weight.shape != candidates.shape[-1:]  # not now on this rank, under ZeRO
            or not fuses(candidates, norm.weight)
        ):
            return self.select(candidates, decision), {}
        selected, normed = take_and_norm(candidates, decision.rows, norm)
        return selected, {"normed": normed}

    @property
    def needs_origin(self) -> bool:
        """Whether later steps need the states that entered the recursion."""
        is_entered = self.step_input is not None and self.step_input.needs_origin
        return self.router.combines_with_origin or is_entered

    @property
    def loop_state(self) -> LoopState | None:
        """What tokens carry between steps, if it is more than their state."""
        return self.streams or self.history or self.router.loop_state

    def begin(self, hidden: Float[Tensor, "s b h"]) -> Float[Tensor, "s b h"]:
        """The states that enter the recursion, in the form of `loop_state`, if there is one."""
        return hidden if self.loop_state is None else self.loop_state.begin(hidden)

    def end(self, states: Float[Tensor, "n b h"]) -> Float[Tensor, "n b h"]:
        """The opposite of `begin`: the hidden states that steps' states stand for."""
        return states if self.loop_state is None else self.loop_state.end(states)

    @property
    def enters_changed(self) -> bool:
        """Whether `enter` gives the layers anything else than the selected tokens' states."""
        return self.step_input is not None or self.loop_state is not None

    def enter(self, step: int, selected: Tensor, origin: Tensor | None) -> Tensor:
        """The input of the layers: what `loop_state` reads, and what `step_input` adds."""
        entering = selected if self.loop_state is None else self.loop_state.read(step, selected)
        if self.step_input is None:
            return entering
        return self.step_input(step, entering, None if origin is None else self.end(origin))

    @named("mor/block")
    def run_layers(
        self, entering: Float[Tensor, "k b h"], context: StepContext, **arguments: Any
    ) -> Float[Tensor, "k b h"]:
        """Run the shared layers on the tokens of the step.

        Args:
            entering: the result of `enter`.
            context: the context of the step, see `begin_step`.
            arguments: passed on to the layers.
        """
        if not (self.recompute and torch.is_grad_enabled()):
            return self.layers(entering, context, **arguments)
        run = partial(self.layers, **arguments)
        return cast(Tensor, checkpoint(run, entering, context, use_reentrant=False))

    @named("mor/combine")
    def combine(
        self,
        step: int,
        selected: Float[Tensor, "k b h"],
        output: Float[Tensor, "k b h"],
        decision: RoutingDecision,
        origin: Float[Tensor, "k b h"] | None,
        notes: Float[Tensor, "k b m"] | None = None,
    ) -> Float[Tensor, "k b h"]:
        """The new states of the tokens that ran the step. Padding slots keep their states.

        Args:
            selected: the result of `select`.
            output: the result of `run_layers`.
            origin: the states with which the same rows entered the recursion, if `needs_origin`.
            notes: of `loop_state` about the rows, if its parameters are elsewhere.
        """
        local = self.placement.shard(decision)
        origin = origin if self.router.combines_with_origin else None

        def combine(states: Tensor, output: Tensor, origin: Tensor | None) -> Tensor:
            return self.router.combine(step, states, output, local, origin)

        if self.loop_state is None:
            updated = combine(selected, output, origin)
        else:
            updated = self.loop_state.update(step, selected, output, origin, combine, notes)
        if local.tokens.is_padding is None:
            return updated
        return torch.where(local.tokens.is_padding[..., None], selected, updated)

    def adds_in_place(
        self,
        candidates: Float[Tensor, "n b h"],
        output: Float[Tensor, "k b h"],
        decision: RoutingDecision,
    ) -> bool:
        """Whether one kernel combines the output of a step and writes it back (`add_in_place`)."""
        return (
            decision.rows is not None
            and decision.gates is not None
            and self.router.adds_gated_output
            and self.loop_state is None
            and isinstance(self.placement, LocalPlacement)
            and fuses(candidates, output, decision.gates)
        )

    @named("mor/combine")
    def add_in_place(
        self,
        candidates: Float[Tensor, "n b h"],
        output: Float[Tensor, "k b h"],
        decision: RoutingDecision,
    ) -> Float[Tensor, "n b h"]:
        """`combine` and `Placement.write_back` of the last step, whose result nobody selects from."""
        assert decision.gates is not None
        is_padding = decision.tokens.is_padding
        return add_gated(candidates, output, decision.gates, decision.rows, is_padding)

    @contextmanager
    def observed(self, observer: RoutingObserver) -> Iterator[None]:
        """A context in which `observer` is called for each routed step, in training and generation.

        Several observers may be active at once. They get the tensors themselves, not copies.
        """
        self._observers = (*self._observers, observer)
        try:
            yield
        finally:
            watching = list(self._observers)
            watching.remove(observer)
            self._observers = tuple(watching)

    @named("mor/write back")
    def _of_all_tokens(
        self, updated: Tensor, steps: Sequence[tuple[Tensor, RoutingDecision]]
    ) -> Float[Tensor, "s b h"]:
        # Selections nest: each step chose among the tokens of the step before. So the deepest states
        # are written back first.
        for candidates, decision in reversed(steps):
            updated = self.placement.write_back(candidates, updated, decision)
        return updated

    def _exited(
        self, candidates: Tensor, previous: RoutingDecision, decision: RoutingDecision
    ) -> Exited | None:
        rest = previous.rest(decision) if self.kv_policy == "exit_state" else None
        if rest is None:
            return None
        return Exited(rest.tokens, self.end(self.select(candidates, rest)))
