"""Figures of a comparison. A model has the same colour in all of them."""

import statistics
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from mor_tools.comparison.results import ModelResult, Point
from mor_tools.reports.plots import INK, depth_color, figure_of, legend

_SPENT: tuple[tuple[str, Callable[[Point], float]], ...] = (
    ("training FLOPs", lambda point: point.flops),
    ("training tokens", lambda point: point.tokens),
    ("seconds of training", lambda point: point.seconds),
)
_LINES = ("-", "--", "-.", ":")


def loss_figure(found: Sequence[ModelResult]) -> Figure:
    """Held-out loss over what was spent: mean over the seeds, and from the lowest to the highest."""
    figure, panels = figure_of(3, width=3.6, height=3.4)
    for axes, (name, spent) in zip(panels, _SPENT, strict=True):
        for index, result in enumerate(found):
            points = list(zip(*(run.curve for run in result.runs), strict=True))  # [step seed]
            x = [statistics.fmean(map(spent, seeds)) for seeds in points]
            losses = [[point.loss for point in seeds] for seeds in points]
            color = depth_color(index)
            axes.plot(
                x,
                list(map(statistics.fmean, losses)),
                _LINES[index % len(_LINES)],
                marker="o",
                markersize=3,
                color=color,
                label=result.model.name,
            )
            low, high = list(map(min, losses)), list(map(max, losses))
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set_xlabel(name)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
    panels[0].set_ylabel("nats per token")
    legend(panels[0])
    return figure


def seed_figure(found: Sequence[ModelResult]) -> Figure:
    """The loss of each run at its end, and the mean of each model."""
    figure, (axes,) = figure_of(1, width=6.4, height=0.9 + 0.4 * len(found))
    for index, result in enumerate(found):
        color = depth_color(index)
        axes.plot(result.loss.values, [index] * len(result.runs), "o", color=color, alpha=0.7)
        axes.plot([result.loss.mean], [index], "|", color=INK, markersize=16)
    axes.set_yticks(range(len(found)), [result.model.name for result in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("held-out loss, nats per token (the line is the mean)")
    return figure


def depth_figure(found: Sequence[ModelResult]) -> Figure:
    """For each model with a recursion, the share of tokens of each depth."""
    shown = [result for result in found if result.depth_shares is not None]
    figure, (axes,) = figure_of(1, width=6.4, height=0.9 + 0.4 * len(shown))
    known: set[int] = set()
    for row, result in enumerate(shown):
        left = 0.0
        for depth, share in enumerate(result.depth_shares or ()):
            if share <= 1e-6:
                continue
            label = None if depth in known else f"{depth}"
            known.add(depth)
            axes.barh(row, share, left=left, color=depth_color(depth), label=label)
            left += share
    axes.set_yticks(range(len(shown)), [result.model.name for result in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("share of tokens by the recursion steps they took")
    legend(axes, ncols=max(1, len(known)), loc="lower right", bbox_to_anchor=(1, 1))
    return figure
