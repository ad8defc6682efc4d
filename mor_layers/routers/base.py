"""What a router is, and how to bring your own.

Legend: `b` batch, `n` candidates of a step, `k` tokens selected, `h` hidden, `c` logits a token.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mor_layers.routing import RoutingDecision
from mor_layers.thresholds import PreciseBuffers


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
    """Settings of a router: a frozen dataclass that knows which router it builds."""

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

    def mean_experts_for(self, num_recursions: int) -> tuple[float, ...] | None:
        """Mean number of experts that a token shall take at each step; None: as the layers say."""
        return None


_REGISTRY: dict[str, type[RouterConfig]] = {}


def register_router[C: type[RouterConfig]](name: str):
    """Class decorator: make a `RouterConfig` known to YAML as `router: {type: name, ...}`.

    Raises:
        ValueError: another class already has the name.
    """

    def register(config: C) -> C:
        if _REGISTRY.get(name, config) is not config:
            raise ValueError(
                f"a router named {name!r} is registered already ({_REGISTRY[name].__qualname__}). "
                "Choose another name."
            )
        _REGISTRY[name] = config
        return config

    return register


def registered_routers() -> dict[str, type[RouterConfig]]:
    """Every registered router's settings class, by the name YAML gives it."""
    return dict(_REGISTRY)


def default_capacity_factors(num_recursions: int) -> tuple[float, ...]:
    """`(N_r - r + 1) / N_r` for r = 1 .. N_r."""
    return tuple((num_recursions - r) / num_recursions for r in range(num_recursions))


def checked_capacity_factors(
    factors: tuple[float, ...] | None, num_recursions: int
) -> tuple[float, ...]:
    """The factors, or the default ones for None.

    Raises:
        ValueError: their number is not `num_recursions`, one is outside (0, 1], or one is larger
            than the one before.
    """
    if factors is None:
        return default_capacity_factors(num_recursions)
    advice = f"Use {num_recursions} non-increasing numbers in (0, 1], or leave it out."
    if len(factors) != num_recursions:
        raise ValueError(
            f"capacity_factors={factors} has {len(factors)} entries for {num_recursions} "
            f"recursions. {advice}"
        )
    if not all(0.0 < factor <= 1.0 for factor in factors):
        raise ValueError(f"capacity_factors={factors} has an entry outside (0, 1]. {advice}")
    if any(later > earlier for earlier, later in pairwise(factors)):
        raise ValueError(
            f"capacity_factors={factors} increase, but a token that left cannot return. {advice}"
        )
    return tuple(factors)


class CalledParameters(nn.ParameterList):
    """Parameters that are read by a call, `parameters(i)`.

    What must happen before a module's parameters are used, such as waiting for those that an
    optimizer gathers meanwhile, hangs on calls of the module that holds them.
    """

    __call__ = nn.Module.__call__

    def forward(self, index: int) -> Tensor:
        return self[index]


class Scorer(nn.Module):
    """Logits of tokens from their hidden states, computed in fp32: `h → out` or `h → 2h → out`.

    Neither has biases (arXiv 2507.10524, table 5), unless the last is given a first value.
    """

    def __init__(
        self, architecture: str, hidden_size: int, num_logits: int, bias: float | None = None
    ) -> None:
        super().__init__()
        self.first_bias = bias
        sizes = [hidden_size, num_logits]
        if architecture == "mlp":
            sizes.insert(1, 2 * hidden_size)
        self.weights = CalledParameters(
            nn.Parameter(torch.empty(out, into)) for into, out in pairwise(sizes)
        )
        self.bias = None if bias is None else nn.Parameter(torch.empty(num_logits))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02, as the published implementation starts."""
        for weight in self.weights:
            nn.init.normal_(weight, std=0.02)
        if self.bias is not None and self.first_bias is not None:
            nn.init.constant_(self.bias, self.first_bias)

    def forward(
        self, hidden: Float[Tensor, "n b h"], temperature: float = 1.0
    ) -> Float[Tensor, "n b c"]:
        """Logits of the states divided by a temperature."""
        values = hidden.float() if temperature == 1.0 else (hidden / temperature).float()
        for i in range(len(self.weights)):
            if i:
                values = nn.functional.gelu(values)
            values = nn.functional.linear(values, self.weights(i).float())
        return values if self.bias is None else values + self.bias.float()


def bar_above(values: Float[Tensor, " t"], count: float) -> float:
    """A number that `count` of the values, rounded, exceed: halfway between two neighbours."""
    kept = min(len(values), max(0, round(count)))
    if kept == 0:
        return torch.finfo(torch.float32).max
    if kept == len(values):
        return torch.finfo(torch.float32).min
    ordered = values.double().sort(descending=True).values
    return float(ordered[kept - 1] + ordered[kept]) / 2


def require_choice(owner: str, field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError where `value` is not one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{owner}.{field}={value!r} is unknown. Use one of {', '.join(allowed)}.")


def require_positive(owner: str, **values: float) -> None:
    """Raise ValueError where a value is not above 0 and finite."""
    for field, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{owner}.{field}={value} must be above 0, and finite.")


def require_not_negative(owner: str, **values: float) -> None:
    """Raise ValueError where a value is below 0 or not finite."""
    for field, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{owner}.{field}={value} must be 0 or more, and finite.")


def require_gates(
    owner: str, bias: float | None, combine: str, activation: str = "sigmoid"
) -> None:
    """Raise ValueError where a bias of gates is not finite, or there are no gates it could move."""
    if bias is None:
        return
    if not math.isfinite(bias):
        raise ValueError(f"{owner}.gate_bias={bias} must be finite.")
    if combine == "additive" or activation == "softmax":
        given = "combine='additive'" if combine == "additive" else "activation='softmax'"
        raise ValueError(
            f"{owner}.gate_bias={bias} has no effect with {given}. Leave it out, or use "
            "combine='weighted' with activation='sigmoid'."
        )
