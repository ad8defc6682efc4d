"""Draw what a recursion costs next to a plain model, from recorded runs of the other benchmarks.

    python examples/benchmarks/training_step.py --json training_step.json
    python examples/benchmarks/generation.py --shapes 135M --json generation.json
    python examples/benchmarks/plot.py training_step.json generation.json --output costs.svg

Nothing is measured here: every figure is a row of the records, and the picture names the machines that
they were measured on. It follows the reader's light or dark mode.
"""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes

from mor_tools.reports import plots

POLICIES = {"recursion_wise": plots.ACCENT, "recursive_sharing": plots.SECOND}
STYLE = """<style>
{light}
@media (prefers-color-scheme: dark) {{ {dark} }}
</style>"""


def training_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with expert choice.

    Raises:
        ValueError: none of their times is known well enough for a verdict.
    """
    rows = [row for row in record["rows"] if row["router"] == "expert_choice"]
    if all(row["verdict"].startswith("none") for row in rows):
        raise ValueError(
            f"none of {len(rows)} rows with expert_choice has a verdict, because other work took the "
            "processor. Run training_step.py again on a quieter machine."
        )
    return rows


def serving_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in which both models have equally many bytes for keys and values.

    Raises:
        ValueError: there is none.
    """
    rows = [row for row in record["rows"] if row["budget"] == "equal_kv"]
    if not rows:
        raise ValueError(
            "the record of generation.py has no row at equal KV bytes. Run it with --budgets equal_kv."
        )
    return rows


def figure(training: dict[str, Any], serving: dict[str, Any]) -> str:
    """The picture as an SVG file: time and memory of a training step, throughput of generation."""
    drawing, panels = plots.figure_of(3, width=3.4, height=3.5)
    steps, served = training_rows(training), serving_rows(serving)
    timed = [row for row in steps if not row["verdict"].startswith("none")]
    _panel(panels[0], "time of a training step", timed, _time)
    _panel(panels[1], "memory of a training step", steps, lambda row: (row["memory_ratio"],) * 3)
    _panel(panels[2], "tokens per second, generating", served, _throughput)
    plots.legend(panels[0], loc="lower left")
    drawing.supxlabel(_caption(training, serving), color=plots.MUTED, fontsize=8.5)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "costs", "svg.fonttype": "none"}):
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    start = text.index(">", text.index("<svg")) + 1
    return text[:start] + _style(text) + text[start:]


def _panel(axes: Axes, title: str, rows: list[dict[str, Any]], value: Any) -> None:
    """One point with its interval for each row: ratios to the plain model over recursions."""
    axes.axhline(1.0, color=plots.INK, linewidth=1, linestyle="--")
    numbers = sorted({row["num_recursions"] for row in rows})
    for place, (policy, color) in enumerate(POLICIES.items()):
        chosen = [row for row in rows if row["kv_policy"] == policy]
        x = [row["num_recursions"] + 0.08 * (2 * place - 1) for row in chosen]
        low, middle, high = zip(*map(value, chosen), strict=True) if chosen else ((), (), ())
        below = [m - a for m, a in zip(middle, low, strict=True)]
        above = [b - m for m, b in zip(middle, high, strict=True)]
        axes.errorbar(x, middle, (below, above), fmt="o", color=color, capsize=3, label=policy)
        for at, shown in zip(x, middle, strict=True):
            side = "right" if place == 0 else "left"
            axes.annotate(
                f"{shown:.2f}",
                (at, shown),
                textcoords="offset points",
                xytext=(-7 if place == 0 else 7, -3),
                ha=side,
                color=color,
                fontsize=8.5,
            )
    axes.set(title=title, xticks=numbers, xlabel="recursions")
    axes.set_ylim(0, 1.12 * max(axes.get_ylim()[1] / 1.05, 1.0))
    axes.set_xlim(numbers[0] - 0.6, numbers[-1] + 0.6)
    axes.annotate(
        "plain model", (0.98, 1.0), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="right", color=plots.INK, fontsize=8.5,
    )  # fmt: skip


def _time(row: dict[str, Any]) -> tuple[float, float, float]:
    estimate = row["time"]
    return estimate["low"], estimate["ratio"], estimate["high"]


def _throughput(row: dict[str, Any]) -> tuple[float, float, float]:
    return row["turns"][0], row["throughput_ratio"], row["turns"][-1]


def _caption(training: dict[str, Any], serving: dict[str, Any]) -> str:
    """What was measured, where, and what the bars are."""
    at, run = training["settings"], serving["settings"]
    lines = [
        f"Training: expert choice, {at['layers']} unrolled layers, h = {at['hidden']}, "
        f"s = {at['sequence']}, micro-batch {at['micro_batch']}; bars: 95 % intervals. "
        f"{_place(training['machine'])}",
        f"Generating: {run['shapes'][0]} shape, random weights, {run['dtype']}, KV memory of "
        f"{run['kv_sequences']} plain sequences; bars: range of {run['turns']} turns. "
        f"{_place(serving['machine'])}",
    ]
    return "\n".join(lines)


def _place(machine: dict[str, Any]) -> str:
    return f"{machine['processor']}, {machine['threads']} thread, {machine['date']}"


def _style(text: str) -> str:
    """CSS that gives the placeholder colors of the drawing their light and dark values."""

    def rules(mode: dict[str, str]) -> str:
        return " ".join(
            f'[style*="fill: {stand_in}"] {{ fill: {color} !important }} '
            f'[style*="stroke: {stand_in}"] {{ stroke: {color} !important }}'
            for stand_in, color in mode.items()
            if stand_in in text
        )

    return STYLE.format(light=rules(plots.LIGHT), dark=rules(plots.DARK))


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("training", type=Path, help="what training_step.py --json wrote")
    parser.add_argument("generation", type=Path, help="what generation.py --json wrote")
    parser.add_argument("--output", type=Path, required=True, help="the SVG file to write")
    options = parser.parse_args(arguments)
    records = [json.loads(file.read_text()) for file in (options.training, options.generation)]
    options.output.write_text(figure(*records))


if __name__ == "__main__":
    main()
