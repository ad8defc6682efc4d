"""The tables of a comparison: of what is planned, and of what came out."""

from collections.abc import Sequence

from rich.table import Table

from mor_tools.comparison.plan import Comparison
from mor_tools.comparison.results import ModelResult
from mor_tools.comparison.statistics import Spread

HEADS = (
    "model",
    "parameters",
    "KV bytes per token",
    "training FLOPs per token",
    "steps",
    "tokens",
    "FLOPs spent",
    "seconds",
    "held-out loss",
    "difference to the reference",
    "depth shares",
)
_OVERSPENT = 0.02
"""Relative deviation from the planned FLOPs from which it is told."""


def plan_table(comparison: Comparison) -> Table:
    """The runs of each model, for the terminal."""
    table = Table(title=f"equal: {', '.join(comparison.equal)}", title_justify="left")
    heads = ("model", "parameters", "KV bytes/token", "FLOPs/token", "steps", "tokens", "FLOPs")
    for head in heads:
        table.add_column(head, justify="left" if head == "model" else "right")
    for model in comparison.models:
        costs, steps = model.costs, model.settings.training.steps
        table.add_row(
            model.name,
            f"{costs.parameters:,}",
            f"{costs.kv_bytes:,.0f}",
            f"{costs.flops_per_token:.3g}",
            f"{steps:,}",
            f"{steps * costs.tokens_per_step:,}",
            f"{costs.flops(steps):.3g}",
        )
    seeds = len(comparison.seeds)
    table.caption = (
        f"{seeds} seeds, {seeds * len(comparison.models)} runs, into {comparison.output}"
    )
    table.caption_justify = "left"
    return table


def cells(result: ModelResult) -> tuple[str, ...]:
    """A model's row under `HEADS`."""
    costs, ends = result.model.costs, [run.end for run in result.runs]
    difference = "reference" if result.difference is None else result.difference.verdict()
    return (
        result.model.name,
        f"{result.runs[0].parameters:,}",
        f"{costs.kv_bytes:,.0f}",
        f"{costs.flops_per_token:.4g}",
        f"{result.model.settings.training.steps:,}",
        f"{ends[0].tokens:,}",
        f"{Spread.of([end.flops for end in ends]).mean:.4g}",
        f"{Spread.of([end.seconds for end in ends]).mean:,.1f}",
        result.loss.shown(),
        difference,
        depth_text(result.depth_shares),
    )


def depth_text(shares: Sequence[float] | None) -> str:
    """Shares of the tokens by depth, those that took no step left out unless there are any."""
    if shares is None:
        return "–"
    shown = [(depth, share) for depth, share in enumerate(shares) if depth or share > 1e-6]
    return " · ".join(f"{depth}: {share:.0%}" for depth, share in shown)


def markdown(found: Sequence[ModelResult]) -> str:
    """The table of results in Markdown."""
    lines = ["| " + " | ".join(HEADS) + " |", "|---|" + "---:|" * (len(HEADS) - 1)]
    lines += ["| " + " | ".join(cells(result)) + " |" for result in found]
    return "\n".join(lines)


def notes(comparison: Comparison, found: Sequence[ModelResult]) -> list[str]:
    """What a reader of the table must know, in sentences."""
    told = [
        "Losses are in nats per token on held-out text, with tokens routed as in generation. ± is the "
        "standard deviation over the seeds; for a difference it is half of the 95 % confidence "
        "interval of the differences seed by seed.",
    ]
    finished, planned = sum(len(r.runs) for r in found), len(list(comparison.runs()))
    if finished < planned:
        told.append(f"{finished} of {planned} runs are finished.")
    if len(comparison.seeds) == 1:
        told.append("With one seed no difference can be told from chance.")
    if comparison.budget_unit == "flops":
        for result in found:
            spent = Spread.of([run.end.flops for run in result.runs]).mean
            planned_flops = result.model.costs.flops(result.model.settings.training.steps)
            deviation = spent / planned_flops - 1
            if abs(deviation) > _OVERSPENT:
                told.append(
                    f"{result.model.name} spent {abs(deviation):.1%} "
                    f"{'more' if deviation > 0 else 'less'} than the {planned_flops:.4g} FLOPs that "
                    "were planned, because other shares of the tokens ran its recursion steps."
                )
    return told
