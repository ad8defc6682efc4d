"""What a router is, and how to bring your own.

Legend: `b` batch, `n` candidates of a step, `k` tokens selected, `h` hidden, `c` logits a token.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mor_layers.modules import PreciseBuffers
from mor_layers.routers.declarations import (
    PublishedRouter,
    ScorerMatrix,
    StepNotes,
    measured_scorers,
    observed_notes,
)
from mor_layers.routers.loop_state import LoopState
from mor_layers.selection import RoutingDecision, capacity
from mor_layers.selection.fused import add_gated


@dataclass(frozen=True)
class StepScores:
    """How a router scores tokens for one step, for display only."""

    step: int
    """The 0-based step that the scores refer to."""
    values: Float[Tensor, "n b"]
    """One score per candidate of that step."""
    threshold: float | None = None
    """In generation, a token runs the step if its score exceeds this. None: the router uses no
    threshold."""


class Router(PreciseBuffers, ABC):
    """Decides, step by step, which tokens continue. Subclass it to write your own router.

    The work is split into parts, so that the same router works on one process and on many. `logits`
    scores each token by itself, on the rank that has its hidden state. `decide` sees the logits of
    the full sequence, the same on every rank. So does `assess`, which adds losses and metrics that
    training needs and generation does not. `combine` merges the block's output into the selected
    tokens.

    Selections nest: a step's candidates are the tokens that ran the step before.
    """

    combines_with_origin: ClassVar[bool] = False
    """Whether `combine` reads the states that entered the recursion."""
    draws: ClassVar[bool] = True
    """Whether routing draws random numbers. Ranks that share a sequence then need the same ones. In
    Megatron the state of the generator is swapped for it, which no graph of torch.compile can hold."""

    def __init__(self, num_recursions: int) -> None:
        super().__init__()
        self.num_recursions = num_recursions
        # Not a class attribute, which would hide a module of this name.
        self.loop_state: LoopState | None = None
        """What tokens carry between steps, if it is more than their state; `combine` then gets that."""

    @property
    def adds_gated_output(self) -> bool:
        """Whether `combine` is the default one, which may then be one kernel with the write-back."""
        return type(self).combine is Router.combine

    @property
    def first_trained_step(self) -> int:
        """The first step that gradients go through. Earlier ones run without gradients."""
        return 0

    def logits(self, hidden: Float[Tensor, "n b h"], step: int) -> Float[Tensor, "n b c"] | None:
        """The logits of each candidate, from its own hidden state. None if the step needs no logits."""
        return None

    @abstractmethod
    def decide(
        self,
        logits: Float[Tensor, "n b c"] | None,
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
    ) -> RoutingDecision:
        """Choose among the tokens of the previous decision.

        Args:
            logits: the result of `logits` for this step, for all candidates.
            step: 0-based recursion step.
            previous: the candidates, `previous.tokens`, and what was planned for them. Its
                `keep_where`, `keep_top`, `keep_all` and `keep_valid` make the result.
            causal: a token's depth may depend on earlier tokens only. Generation needs this.
        """

    def assess(
        self,
        logits: Float[Tensor, "n b c"] | None,
        step: int,
        previous: RoutingDecision,
        decision: RoutingDecision,
    ) -> RoutingDecision:
        """Add auxiliary losses, metrics and observations to a decision. The default adds nothing.

        The generation engine does not call this method.

        Args:
            logits: the logits that `decide` got.
            step: 0-based recursion step.
            previous: the candidates, and what was planned for them.
            decision: the result of `decide`.
        """
        return decision

    def combine(
        self,
        step: int,
        selected: Float[Tensor, "k b h"],
        output: Float[Tensor, "k b h"],
        decision: RoutingDecision,
        origin: Float[Tensor, "k b h"] | None,
    ) -> Float[Tensor, "k b h"]:
        """The new states of the selected tokens.

        The default is `selected + gates · output` if the decision has gates, else the output.

        Args:
            selected: the states that entered the block.
            output: the block's output, including its residual stream.
            decision: the decision of this step for the same rows.
            origin: the states that entered the recursion, if `combines_with_origin`.
        """
        if decision.gates is None:
            return output
        return add_gated(selected, output, decision.gates)

    def teach(
        self,
        states: Sequence[Float[Tensor, "s b h"]],
        is_right: Bool[Tensor, "r s b"],
        is_counted: Bool[Tensor, "s b"],
        gather: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> dict[str, Tensor]:
        """Losses by which the router learns where tokens should exit, if `RouterConfig.learns_exits`.

        Args:
            states: the states after each step.
            is_right: whether the most likely token is the right one, read out after each step.
            is_counted: which tokens have a label.
            gather: logits of all tokens from those of `states`, of which this rank may have a part.
        """
        return {}

    def scores(self, logits: Float[Tensor, "n b c"], step: int) -> tuple[StepScores, ...]:
        """How the logits of a step rate each candidate. The default is the first logit.

        No decision depends on it. `mor_layers.inspection` displays these scores.
        """
        return (StepScores(step, logits[..., 0]),)

    def advance(self, tokens_per_step: Float[Tensor, " r"]) -> None:
        """Change the router's state. Called once after each optimizer step, outside `forward`.

        State must not change inside `forward`, because recomputation runs it twice.

        Args:
            tokens_per_step: how many tokens of the global batch ran each step.
        """
        return

    def tune(
        self, shares: tuple[float, ...], observe: Callable[[int], Float[Tensor, "t c"]]
    ) -> None:
        """Set the thresholds of causal routing so that each step runs about a given share of tokens.

        Args:
            shares: for each step, the share of all tokens that should run it. Never increasing.
            observe: runs some text through the model with the thresholds set so far, and returns
                the logits of every candidate of a step.

        Raises:
            ValueError: the router has no thresholds.
        """
        raise ValueError(
            f"{type(self).__name__} has no thresholds to tune. Give it a method `tune`, or serve "
            "the model as it is."
        )

    def adjust(self, observations: dict[str, Tensor]) -> None:
        """Learn from observations. Called after `advance`, if decisions carry any.

        Args:
            observations: the decisions' observations, summed over the global batch.
        """
        return


@dataclass(frozen=True)
class RouterConfig(ABC):
    """The settings of a router: a frozen dataclass that knows which router it builds.

    A subclass only has to define `build`. The other methods and properties declare what the rest of
    the library must know about the router. Each has a default that is safe for any router.
    """

    @abstractmethod
    def build(self, hidden_size: int, num_recursions: int) -> Router:
        """Build the router for hidden states of `hidden_size` and `num_recursions` steps."""

    def validate(self, num_recursions: int) -> None:
        """Raise ValueError if these settings do not fit `num_recursions` steps."""
        return

    @property
    def needs_updates(self) -> bool:
        """Whether `Router.advance` must be called after each optimizer step."""
        return False

    def capacity_factors_for(self, num_recursions: int) -> tuple[float, ...] | None:
        """The expected share of tokens at each step, or None if the settings do not determine it."""
        return None

    def capacity_factors_at(
        self, num_recursions: int, training_step: int
    ) -> tuple[float, ...] | None:
        """The same during the optimizer step `training_step` (0-based), which a warm-up may change."""
        return self.capacity_factors_for(num_recursions)

    @property
    def rounds_capacities_to(self) -> int:
        """What the number of tokens that run a step is rounded up to a multiple of."""
        return 1

    def capacities_for(self, num_recursions: int, length: int) -> tuple[int, ...] | None:
        """How many tokens of a document of `length` tokens each step is expected to run, or None if
        the settings do not determine it.
        """
        factors, multiple = self.capacity_factors_for(num_recursions), self.rounds_capacities_to
        if factors is None:
            return None
        return tuple(capacity(factor, length, multiple) for factor in factors)

    @property
    def repeats_layers(self) -> bool:
        """Whether several steps also make sense where layers repeat one by one (sequence sharing), each
        with this router for itself: every token runs every step."""
        return False

    @property
    def replaces_states(self) -> bool:
        """Whether `Router.combine` returns the block's output as it is, whatever state entered it.
        Pipeline stages then need not send that state."""
        return False

    @property
    def learns_exits(self) -> bool:
        """Whether `Router.teach` has losses, for which training reads out the states of all steps."""
        return False

    @property
    def has_loop_state(self) -> bool:
        """Whether the router has a `Router.loop_state`."""
        return False

    @property
    def truncates_gradients(self) -> bool:
        """Whether gradients go through the last steps only, see `Router.first_trained_step`."""
        return False

    def trained_shares_for(self, num_recursions: int) -> tuple[float, ...]:
        """For each step, the share of its runs in training that gradients go through."""
        return (1.0,) * num_recursions

    @property
    def has_fixed_capacities(self) -> bool:
        """Whether each step of training runs exactly as many tokens of each sequence as `capacities_for`
        says, in batches without documents and padding."""
        return False

    @property
    def is_causal(self) -> bool:
        """Whether evaluation decides the same with and without `causal`, never reading later tokens."""
        return False

    @property
    def lets_tokens_exit(self) -> bool:
        """Whether, outside training, a token may leave before the last step."""
        return True

    def scorer_shapes(
        self, hidden_size: int, num_recursions: int
    ) -> tuple[tuple[ScorerMatrix, ...], ...]:
        """For each step, the matrices that every candidate is multiplied by: the cost of routing.

        The default measures which matrices `Router.logits` uses, and assumes that all logits reach
        a loss.
        """
        # Parameters made in inference mode could not take part in a backward pass.
        with torch.inference_mode(False), torch.device("meta"):
            router = self.build(hidden_size, num_recursions)
        if type(router).logits is Router.logits:  # not overridden, so there are no logits
            return ((),) * num_recursions
        return measured_scorers(router, hidden_size)

    def notes_for(self, num_recursions: int) -> tuple[StepNotes, ...]:
        """For each step, what decisions record about each token, which pipeline stages must send
        on.

        The default runs the router once on a few tokens and looks at its decisions.
        """
        return observed_notes(self, num_recursions)

    def published_for(self, num_recursions: int) -> PublishedRouter:
        """How checkpoints of the published Mixture-of-Recursions code describe this router.

        Raises:
            ValueError: they cannot, which is the default.
        """
        raise ValueError(
            f"published checkpoints cannot describe router={type(self).__name__!r}. Keep the model "
            "in our format."
        )

    def mean_experts_for(self, num_recursions: int) -> tuple[float, ...] | None:
        """The mean number of experts per token at each step, or None to leave it to the layers."""
        return None
