"""What the finished runs of a comparison came to, from their summaries and histories."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor_tools.comparison.costs import Costs
from mor_tools.comparison.plan import Comparison, Model
from mor_tools.comparison.statistics import Difference, Spread
from mor_tools.reports.rows import Row, read_rows


@dataclass(frozen=True)
class Point:
    """A held-out loss, and what the run had spent by then."""

    step: int
    loss: float
    """Held-out loss in nats per token, routed as in generation."""
    tokens: int
    flops: float
    seconds: float
    """Of training, without evaluation and checkpoints."""


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    seed: int
    loss: float
    """Held-out loss in nats per token at the end, routed as in generation, where no token's depth
    depends on later tokens."""
    training_loss: float
    """Held-out loss with tokens routed as in training."""
    parameters: int
    depth_shares: tuple[float, ...] | None
    """`depth_shares[d]` is the share of held-out tokens that took d steps, routed as in generation.
    None without recursion."""
    curve: tuple[Point, ...]

    @property
    def end(self) -> Point:
        """What the run spent in total."""
        return self.curve[-1]


@dataclass(frozen=True)
class ModelResult:
    """The finished runs of a model."""

    model: Model
    runs: tuple[RunResult, ...]
    difference: Difference | None
    """From the reference, over the seeds that both have; None for the reference itself."""

    @property
    def loss(self) -> Spread:
        """Held-out loss at the end."""
        return Spread.of([run.loss for run in self.runs])

    @property
    def depth_shares(self) -> tuple[float, ...] | None:
        """Mean over the seeds."""
        shares = [run.depth_shares for run in self.runs if run.depth_shares is not None]
        if not shares:
            return None
        return tuple(sum(column) / len(shares) for column in zip(*shares, strict=True))


def results(comparison: Comparison) -> list[ModelResult]:
    """The finished runs of each model that has any, in the order of the comparison."""
    found: list[ModelResult] = []
    reference: dict[int, float] | None = None
    for model in comparison.models:
        folders = ((seed, comparison.folder(model.name, seed)) for seed in comparison.seeds)
        found_runs = (_run(model, seed, folder) for seed, folder in folders)
        runs = [run for run in found_runs if run is not None]
        if not runs:
            continue
        difference = None
        if model is comparison.models[0]:
            reference = {run.seed: run.loss for run in runs}
        elif reference is not None:
            shared = [run for run in runs if run.seed in reference]
            if shared:
                losses = [run.loss for run in shared]
                difference = Difference.between(losses, [reference[run.seed] for run in shared])
        found.append(ModelResult(model, tuple(runs), difference))
    return found


def curve(rows: Sequence[Row], costs: Costs) -> list[Point]:
    """The held-out losses of a run, with what it had spent.

    A row with routing or a speed tells it for the steps since the last such row.
    """
    waiting: list[Row] = []
    flops = seconds = 0.0
    points: list[Point] = []
    for row in rows:
        waiting.append(row)
        if row.tokens_per_second is None and row is not rows[-1]:
            continue
        shares = None if row.routing is None else costs.reported(row.routing.shares)
        per_step = costs.flops_with(shares) * costs.tokens_per_step
        speed = row.tokens_per_second
        for passed in waiting:
            flops += per_step
            seconds += costs.tokens_per_step / speed if speed else 0.0
            held_out = _held_out(passed)
            if held_out is not None:
                tokens = passed.step * costs.tokens_per_step
                points.append(Point(passed.step, held_out, tokens, flops, seconds))
        waiting = []
    return points


def _run(model: Model, seed: int, folder: Path) -> RunResult | None:
    """The result in a run's folder; None where the run is not finished, or is being extended."""
    file = folder / "summary.json"
    summary = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if summary.get("steps") != model.settings.training.steps:
        return None
    loss, causal = summary["validation_loss"], summary["causal_validation_loss"]
    shares: Any = summary["causal_depth_shares"] or summary["depth_shares"]
    return RunResult(
        seed,
        loss if causal is None else causal,
        loss,
        summary["parameters"],
        None if shares is None else tuple(shares),
        tuple(curve(read_rows(folder / "history.jsonl"), model.costs)),
    )


def _held_out(row: Row) -> float | None:
    causal = row.causal_validation_loss
    return row.validation_loss if causal is None else causal
