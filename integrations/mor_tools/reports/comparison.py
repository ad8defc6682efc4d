"""Several pretraining runs on one page: their losses, what they came to, and how they differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from mor_tools.reports.page import document, table
from mor_tools.reports.plots import depth_color, figure_of, legend, svg
from mor_tools.reports.rows import Row

_NONE = "–"
_SMOOTHED = 10
"""Rows over which a training loss is averaged."""
_HEADS = (
    "run",
    "steps",
    "tokens",
    "held-out loss",
    "routed as in generation",
    "parameters",
    "training FLOPs per token",
    "tokens/s",
)


@dataclass(frozen=True)
class ComparedRun:
    """A run, finished or not."""

    name: str
    """Unlike those of the other runs."""
    rows: Sequence[Row]
    """Its optimizer steps so far, at least one."""
    settings: Mapping[str, Any]
    """As `run.json` has them, nested."""
    summary: Mapping[str, Any]
    """As `summary.json` has it; empty for a run that is not complete."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, over all processes."""
        return (
            self.settings["training"]["global_batch_size"]
            * self.settings["data"]["sequence_length"]
        )

    @property
    def held_out(self) -> list[Row]:
        """The rows with a validation loss."""
        return [row for row in self.rows if row.validation_loss is not None]


def render(runs: Sequence[ComparedRun]) -> str:
    """The comparison as one HTML document."""
    sections = [
        table(_HEADS, [_numbers(run) for run in runs]),
        "<h2>Loss</h2>",
        '<p class="note">Thin lines are training losses, averaged over the last '
        f"{_SMOOTHED} rows; lines with points are losses on held-out text. Do not compare losses of "
        "runs with other text or another tokenizer.</p>",
        svg(loss_figure(runs), "losses of the runs over optimizer steps and over tokens"),
        "<h2>Settings that differ</h2>",
    ]
    differing = differences([run.settings for run in runs])
    if differing:
        heads = ["setting", *(run.name for run in runs)]
        sections.append(table(heads, [[name, *values] for name, values in differing.items()]))
    else:
        sections.append("<p>None.</p>")
    return document("Comparison of pretraining runs", sections, len(runs))


def loss_figure(runs: Sequence[ComparedRun]) -> Figure:
    """Losses over optimizer steps and, beside them, over tokens."""
    figure, panels = figure_of(2, width=5, height=3.6)
    for number, run in enumerate(runs, start=1):
        color = depth_color(number)
        for axes, unit in zip(panels, (1, run.tokens_per_step), strict=True):
            steps = [row.step * unit for row in run.rows]
            axes.plot(steps, _smoothed([r.loss for r in run.rows]), color=color, linewidth=0.8)
            axes.plot(
                [row.step * unit for row in run.held_out],
                [row.validation_loss for row in run.held_out],
                "o-",
                color=color,
                markersize=3,
                label=run.name,
            )
    for axes, unit in zip(panels, ("optimizer step", "tokens"), strict=True):
        axes.set_xlabel(unit)
        axes.set_ylabel("nats per token")
    legend(panels[0])
    return figure


def differences(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The value of each run by the dotted name of a setting, for settings that are not all the same.

    A run that lacks a setting, because another one makes it meaningless, has a dash.
    """
    flat = [_flat(values) for values in settings]
    names = dict.fromkeys(name for values in flat for name in values)
    found = {name: [str(values.get(name, _NONE)) for values in flat] for name in names}
    return {
        name: values for name, values in found.items() if len(set(values)) > 1 and name != "output"
    }


def _numbers(run: ComparedRun) -> list[str]:
    """The run's line of the table."""
    last, steps = run.rows[-1], run.settings["training"]["steps"]
    done = f"{last.step:,}" if last.step == steps else f"{last.step:,} of {steps:,}"
    validated = run.held_out[-1] if run.held_out else None
    speeds = [row.tokens_per_second for row in run.rows if row.tokens_per_second is not None]
    return [
        run.name,
        done,
        f"{last.step * run.tokens_per_step:,}",
        _shown(validated and validated.validation_loss, ".3f"),
        _shown(validated and validated.causal_validation_loss, ".3f"),
        _shown(run.summary.get("parameters"), ","),
        _shown(run.summary.get("flops_per_token"), ".4g"),
        _shown(median(speeds) if speeds else None, ",.0f"),
    ]


def _shown(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and of those right before it."""
    windows = (losses[max(0, i + 1 - _SMOOTHED) : i + 1] for i in range(len(losses)))
    return [sum(window) / len(window) for window in windows]


def _flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{where}{name}.")
        else:
            found[where + name] = value
    return found
