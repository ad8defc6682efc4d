"""Figures of an inspection: how a model routes the tokens of a text."""

import torch
from matplotlib.figure import Figure

from mor_layers.inspection import Inspection
from mor_tools.reports.plots import ACCENT, INK, WARNING, depth_color, figure_of, heat_map
from mor_tools.reports.training_figures import depth_bars

_BINS = 40


def figures(seen: Inspection) -> dict[str, Figure]:
    """All figures that apply to this model, by their description."""
    drawn = {
        "Depth of tokens": depth_bars(
            [
                ("as in generation", seen.depth_shares),
                ("as in training", seen.training_depth_shares),
            ]
        ),
        "Depth against surprise": surprise_figure(seen),
    }
    if not seen.scores.isnan().all():
        drawn["Router scores"] = score_figure(seen)
    if seen.cell_shares is not None:
        drawn["Load per recursion step and expert"] = cell_figure(seen)
    return drawn


def surprise_figure(seen: Inspection) -> Figure:
    """Quartiles and mean of the surprise of the tokens of each depth, and of the next tokens."""
    figure, panels = figure_of(2, width=4.6)
    sides = (
        ("the token itself", seen.depths[1:], seen.surprise_correlation),
        ("the token after it", seen.depths[:-1], seen.outlook_correlation),
    )
    for axes, (name, depths, correlation) in zip(panels, sides, strict=True):
        present = sorted(set(depths.tolist()))
        boxes = axes.boxplot(
            [seen.surprise[1:][depths == depth].numpy() for depth in present],
            positions=present,
            whis=(5, 95),
            widths=0.5,
            showfliers=False,
            showmeans=True,
            patch_artist=True,
            medianprops={"color": INK},
            whiskerprops={"color": INK},
            capprops={"color": INK},
            meanprops={"marker": "o", "markerfacecolor": WARNING, "markeredgecolor": WARNING},
        )
        for box, depth in zip(boxes["boxes"], present, strict=True):
            box.set(facecolor=depth_color(depth), edgecolor=INK, alpha=0.75)
        axes.set_xticks(present, [f"{d}\nn={int((depths == d).sum())}" for d in present])
        axes.set_xlim(present[0] - 0.7, present[-1] + 0.7)
        axes.set_xlabel("recursion steps the token took")
        axes.set_ylabel("nats")
        shown = "–" if correlation != correlation else f"{correlation:+.3f}"
        axes.set_title(f"surprise of {name}\nrank correlation {shown}")
    return figure


def score_figure(seen: Inspection) -> Figure:
    """Histogram of the router scores of each step, with the threshold of generation."""
    scored = [step for step in range(seen.num_recursions) if not seen.scores[step].isnan().all()]
    figure, panels = figure_of(len(scored), width=max(3.0, 8 / len(scored)))
    for axes, step in zip(panels, scored, strict=True):
        scores = seen.scores[step]
        scores = scores[~scores.isnan()]
        axes.hist(scores.numpy(), bins=_BINS, color=depth_color(step + 1))
        threshold = seen.thresholds[step]
        title = f"step {step + 1}, {len(scores):,} tokens"
        if threshold is not None:
            axes.axvline(threshold, linestyle="--", color=WARNING)
            title += f"\n{(scores > threshold).float().mean():.0%} above {threshold:.3g}"
        axes.set_title(title)
        axes.set_xlabel("router score")
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.locator_params(axis="x", nbins=4)
    panels[0].set_ylabel("tokens")
    return figure


def cell_figure(seen: Inspection) -> Figure:
    """Share of a step's assignments that each expert got, and the total of each step."""
    assert seen.cell_shares is not None and seen.expert_load is not None
    cells = seen.cell_shares
    figure, (axes, total) = figure_of(2, width=4.6)
    balanced = 1 / cells.shape[1]
    heat_map(axes, cells.tolist(), 2 * balanced, "recursion step", "expert")
    axes.set_title(f"share of a step's assignments (balanced: {balanced:.2f})")
    steps = torch.arange(len(cells)) + 1
    total.barh(steps.tolist(), seen.expert_load.sum(dim=1).tolist(), color=ACCENT)
    total.invert_yaxis()
    total.set_yticks(steps.tolist())
    total.set_title("assignments to experts")
    return figure
