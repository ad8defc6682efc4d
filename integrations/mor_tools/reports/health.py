"""Recognises what goes wrong in a run from its rows, and says what to do about it.

Each rule uses only what is logged anyway, so that a finished run can be judged from its history,
too. A rule reports only after several rows in succession, because single batches vary.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mor_tools.reports.rows import Routing, Row

NO_GRADIENT = "router_without_gradient"
"""Name of a metric in a row's routing, present only if no parameter of a router had a gradient."""
ROWS_IN_TURN = 3
"""Number of rows with routing that must show a problem before it is reported."""
COLLAPSED = 0.01
"""A step has collapsed if no more than this share of the tokens run it, or all but this share."""
DEAD_BEYOND_CHANCE = 0.2
"""Share of dead positions that is reported, in excess of that of a random selection."""
SMOOTHED_STEPS = 20
"""Steps over which the loss is averaged."""
DIVERGED = 0.5
"""Increase of the averaged loss over its lowest value, in nats per token, that counts as
divergence."""


@dataclass(frozen=True)
class Finding:
    """A problem of a run."""

    subject: str
    """What it is about; only the first finding about each subject is reported."""
    step: int
    """The optimizer step at which it was found."""
    message: str
    """What was observed, and what to do about it."""

    def __str__(self) -> str:
        return f"warning: step {self.step}: {self.message}"


@dataclass(frozen=True)
class PlannedSteps:
    """The steps of a recursion."""

    count: int
    capacity_factors: Sequence[float] | None = None
    """Share of the tokens that each step runs, if the router fixes it."""


@dataclass(frozen=True)
class Plan:
    """The facts about a run that follow from its settings."""

    sequences: int
    """Sequences per global batch."""
    recursions: Sequence[PlannedSteps] = ()
    """One after another."""
    warmup_steps: int = 0
    """Optimizer steps of the routers' warm-up, during which more tokens run than planned."""


class Health:
    """Examines the rows of a run one after the other."""

    def __init__(self, plan: Plan) -> None:
        self.findings: list[Finding] = []
        """All findings so far, in order of time."""
        self._plan = plan
        self._in_turn: dict[str, int] = {}
        self._losses: deque[float] = deque(maxlen=SMOOTHED_STEPS)
        self._lowest = float("inf")

    def add(self, row: Row) -> list[Finding]:
        """Examine the next row; returns the findings that are new."""
        messages = self._loss(row)
        if row.routing is not None:
            messages |= self._lasting(self._routing(row.step, row.routing))
        known = {finding.subject for finding in self.findings}
        found = [Finding(s, row.step, m) for s, m in messages.items() if s not in known]
        self.findings += found
        return found

    def _lasting(self, seen: dict[str, str]) -> dict[str, str]:
        """The problems of a row that the rows before it show as well."""
        self._in_turn = {subject: self._in_turn.get(subject, 0) + 1 for subject in seen}
        return {s: m for s, m in seen.items() if self._in_turn[s] >= ROWS_IN_TURN}

    def _loss(self, row: Row) -> dict[str, str]:
        self._losses.append(row.loss)
        if len(self._losses) < SMOOTHED_STEPS:
            return {}
        mean = sum(self._losses) / SMOOTHED_STEPS
        self._lowest = min(self._lowest, mean)
        if mean <= self._lowest + DIVERGED:
            return {}
        return {
            "loss": f"the loss diverges: its mean over {SMOOTHED_STEPS} steps rose from "
            f"{self._lowest:.2f} to {mean:.2f} nats per token, with a gradient norm of "
            f"{row.gradient_norm:.3g} and a learning rate of {row.learning_rate:.3g}. Start a run "
            "with about half of training.learning_rate or a longer training.warmup_steps."
        }

    def _routing(self, step: int, routing: Routing) -> dict[str, str]:
        found = {}
        if NO_GRADIENT in routing.metrics:
            found["scorer"] = (
                "the router gets no gradient, so that its selection stays random. Its scores must "
                "enter the output or a loss: e.g. recursion.router.combine=weighted, or a "
                "predictor_coefficient or z_loss_coefficient above 0."
            )
        if step > self._plan.warmup_steps:
            found |= self._collapsed(routing.shares) | self._dead(routing)
        return found

    def _collapsed(self, shares: Sequence[float]) -> dict[str, str]:
        found, first = dict[str, str](), 0
        for planned in self._plan.recursions:
            own, factors = shares[first : first + planned.count], planned.capacity_factors
            if factors is None:
                found |= _collapsed_freely(own, first)
            else:
                found |= _collapsed_against(own, factors, first)
            first += planned.count
        return found

    def _dead(self, routing: Routing) -> dict[str, str]:
        last = [shares[-1] for shares in routing.by_recursion]
        by_chance = sum((1 - share) ** self._plan.sequences for share in last) / len(last)
        if routing.dead_positions <= by_chance + DEAD_BEYOND_CHANCE:
            return {}
        return {
            "dead": f"tokens die: at {routing.dead_positions:.0%} of the positions no token of the "
            f"batch ran the last step of a recursion, where a random selection would leave out "
            f"{by_chance:.0%}. The router selects by position. Use a longer "
            "recursion.router.warmup_steps, larger capacity factors, or a smaller learning rate."
        }


def findings(rows: Iterable[Row], plan: Plan) -> list[Finding]:
    """All findings in the rows of a run, in order of time."""
    health = Health(plan)
    for row in rows:
        health.add(row)
    return health.findings


def _collapsed_against(
    shares: Sequence[float], planned: Sequence[float], earlier: int
) -> dict[str, str]:
    """Steps that almost no token runs, or almost all, where another share was planned."""
    return {
        f"depth {number}": f"{share:.0%} of the tokens run recursion step {number}, where "
        f"{factor:.0%} were planned: the depth has collapsed. Check "
        "recursion.router.capacity_factors and warmup_steps, and that documents are not much "
        "shorter than data.sequence_length."
        for number, (share, factor) in enumerate(zip(shares, planned, strict=False), earlier + 1)
        if _is_extreme(share) and not _is_extreme(factor)
    }


def _collapsed_freely(shares: Sequence[float], earlier: int) -> dict[str, str]:
    """If tokens choose their depth, any share of them may run a step, except almost none and almost
    all.
    """
    remedy = (
        "the depth has collapsed. Use a larger recursion.router.balancing_coefficient, another "
        "recursion.router.balancing, or a smaller training.learning_rate."
    )
    if len(shares) > 1 and shares[-1] > 1 - COLLAPSED:
        return {"depth": f"{shares[-1]:.0%} of the tokens run all recursion steps: {remedy}"}
    for number, share in enumerate(shares, earlier + 1):
        if share < COLLAPSED:
            return {"depth": f"{share:.1%} of the tokens run recursion step {number}: {remedy}"}
    return {}


def _is_extreme(share: float) -> bool:
    return not COLLAPSED <= share <= 1 - COLLAPSED
