"""What a router is, and how to bring your own.

Legend: `b` batch, `n` candidates of a step, `k` tokens selected, `h` hidden, `c` logits a token.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mor_layers.modules import PreciseBuffers
from mor_layers.routers.declarations import (
    PublishedRouter,
    ScorerMatrix,
    StepNotes,
    measured_scorers,
    observed_notes,
)
from mor_layers.selection import RoutingDecision


@dataclass(frozen=True)
class StepScores:
    """What a router makes of tokens for one step, for people to look at."""

    step: int
    """The step they are about; 0-based."""
    values: Float[Tensor, "n b"]
    """One number per candidate of the step that was scored."""
    threshold: float | None = None
    """In generation a token runs the step where its number is above it; None: not so decided."""


class Router(PreciseBuffers, ABC):
    """Decides, step by step, which tokens go on. Subclass it to bring your own.

    The work is in parts, so that one router serves one process and many. `logits` looks at tokens
    one by one, wherever their hidden states live. `decide` sees the logits of the full sequence,
    alike on every rank, and so does `assess`, which adds what training wants to know of a decision
    and generation does without. `combine` puts the block's output into the selected tokens.

    Selections nest: a step's candidates are the tokens that ran the step before.
    """

    combines_with_origin: ClassVar[bool] = False
    """Whether `combine` reads the states that entered the recursion."""

    def __init__(self, num_recursions: int) -> None:
        super().__init__()
        self.num_recursions = num_recursions

    def logits(self, hidden: Float[Tensor, "n b h"], step: int) -> Float[Tensor, "n b c"] | None:
        """Logits of each candidate from its own hidden state; None where a step needs none."""
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
            logits: what `logits` gave for this step.
            step: 0-based recursion step.
            previous: the candidates, `previous.tokens`, and what was planned for them. Its
                `keep_where`, `keep_top`, `keep_all` and `keep_valid` make the result.
            causal: a token's fate may depend on earlier tokens only, as generation needs.
        """

    def assess(
        self,
        logits: Float[Tensor, "n b c"] | None,
        step: int,
        previous: RoutingDecision,
        decision: RoutingDecision,
    ) -> RoutingDecision:
        """The decision with its auxiliary losses, metrics and observations. Here: as it is.

        An engine that generates does not call it.

        Args:
            logits: what `decide` got.
            step: 0-based recursion step.
            previous: the candidates, and what was planned for them.
            decision: what `decide` made of them.
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
        """New states of the selected tokens.

        Here: `selected + gates · output` where the decision gates, else the output as it is.

        Args:
            selected: states that entered the block.
            output: the block's output, its residual stream included.
            decision: the decision of this step for the same rows.
            origin: states that entered the recursion, if `combines_with_origin`.
        """
        if decision.gates is None:
            return output
        return selected + decision.gates[..., None].to(output.dtype) * output

    def scores(self, logits: Float[Tensor, "n b c"], step: int) -> tuple[StepScores, ...]:
        """What the logits of a step say of each candidate; here: the first logit as it is.

        Nothing is decided by it. It is what `mor_layers.inspection` shows.
        """
        return (StepScores(step, logits[..., 0]),)

    def advance(self, tokens_per_step: Float[Tensor, " r"]) -> None:
        """Called once after each optimizer step, outside `forward`: the place to change state.

        Args:
            tokens_per_step: how many tokens of the global batch ran each step.
        """
        return

    def tune(
        self, shares: tuple[float, ...], observe: Callable[[int], Float[Tensor, "t c"]]
    ) -> None:
        """Set what decides with `causal=True` so that each step runs about a share of all tokens.

        Args:
            shares: of all tokens, for each step; never rising.
            observe: runs some text through the model, as it is tuned by now, and gives the logits
                of every candidate of a step.

        Raises:
            ValueError: there is nothing to tune.
        """
        raise ValueError(
            f"{type(self).__name__} has no thresholds to tune. Give it a method `tune`, or serve "
            "the model as it is."
        )

    def adjust(self, observations: dict[str, Tensor]) -> None:
        """Called after `advance`, for routers whose decisions carry observations.

        Args:
            observations: what the decisions observed, summed over the global batch.
        """
        return


@dataclass(frozen=True)
class RouterConfig(ABC):
    """Settings of a router: a frozen dataclass that knows which router it builds.

    Only `build` must be given. The other methods and properties declare what the rest of the library
    must know of a router; each has a default that is right, or at least safe, for any router.
    """

    @abstractmethod
    def build(self, hidden_size: int, num_recursions: int) -> Router:
        """The router for hidden states of `hidden_size` and `num_recursions` steps."""

    def validate(self, num_recursions: int) -> None:
        """Raise ValueError where these settings do not fit `num_recursions` steps."""
        return

    @property
    def needs_updates(self) -> bool:
        """Whether the router must be told of optimizer steps through `advance`."""
        return False

    def capacity_factors_for(self, num_recursions: int) -> tuple[float, ...] | None:
        """Expected share of tokens at each step, where the settings fix it."""
        return None

    @property
    def has_fixed_capacities(self) -> bool:
        """Whether in training step r of a batch without documents and padding runs exactly
        `max(1, floor(c_r · s))` tokens of each sequence, with c from `capacity_factors_for`."""
        return False

    @property
    def is_causal(self) -> bool:
        """Whether evaluation decides alike with and without `causal`: no choice reads later tokens."""
        return False

    @property
    def lets_tokens_exit(self) -> bool:
        """Whether, outside training, a token may leave before the last step."""
        return True

    def scorer_shapes(
        self, hidden_size: int, num_recursions: int
    ) -> tuple[tuple[ScorerMatrix, ...], ...]:
        """At each step, the matrices that all its candidates meet: what routing costs.

        Here: those that `Router.logits` is seen to use, as if all logits reached a loss.
        """
        # Parameters made in inference mode would take part in no backward pass.
        with torch.inference_mode(False), torch.device("meta"):
            router = self.build(hidden_size, num_recursions)
        if type(router).logits is Router.logits:  # it has none
            return ((),) * num_recursions
        return measured_scorers(router, hidden_size)

    def notes_for(self, num_recursions: int) -> tuple[StepNotes, ...]:
        """At each step, what decisions say of each token: what travels between pipeline stages.

        Here: as a trial of the router shows.
        """
        return observed_notes(self, num_recursions)

    def published_for(self, num_recursions: int) -> PublishedRouter:
        """The router's place in checkpoints of the published Mixture-of-Recursions code.

        Raises:
            ValueError: it has none, as here.
        """
        raise ValueError(
            f"router={type(self).__name__!r} has no place in a published checkpoint. Keep the model "
            "in our format."
        )

    def mean_experts_for(self, num_recursions: int) -> tuple[float, ...] | None:
        """Mean number of experts that a token shall take at each step; None: as the layers say."""
        return None
