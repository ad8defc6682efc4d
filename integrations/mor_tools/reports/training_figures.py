"""Figures of a training run."""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from mor_tools.reports.plots import (
    ACCENT,
    INK,
    MUTED,
    SECOND,
    WARNING,
    depth_color,
    figure_of,
    heat_map,
    legend,
)
from mor_tools.reports.rows import Routing, Row, Validation, depth_shares


def loss_figure(rows: Sequence[Row], unigram_entropy: float | None = None) -> Figure:
    """Losses over optimizer steps.

    Args:
        unigram_entropy: unigram entropy of the held-out text in nats per token, as a reference.
    """
    figure, (axes,) = figure_of(1, width=6.4)
    axes.plot(*_series(rows, lambda r: r.loss), color=MUTED, linewidth=1, label="training")
    held_out = _series(rows, lambda r: r.validation_loss)
    if held_out[0]:
        axes.plot(*held_out, "o-", markersize=4, color=ACCENT, label="held out")
    causal = _series(rows, lambda r: r.causal_validation_loss)
    if causal[0]:
        name = "held out, routed as in generation"
        axes.plot(*causal, "s:", markersize=4, color=SECOND, label=name)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, linestyle="--", color=WARNING, label="unigram entropy")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per token")
    legend(axes)
    return figure


def depth_figures(validation: Validation) -> list[Figure]:
    """Depths of the held-out tokens in each recursion, routed as in training and as in generation."""
    ways = [("as in training", validation.routing), ("as in generation", validation.causal_routing)]
    named = [(name, routing.by_recursion) for name, routing in ways if routing is not None]
    count = len(named[0][1]) if named else 0
    return [
        depth_bars([(name, depth_shares(shares[index])) for name, shares in named])
        for index in range(count)
    ]


def depth_bars(named: Sequence[tuple[str, Sequence[float]]]) -> Figure:
    """Bars of the share of tokens of each depth, side by side for each way of routing."""
    first = 0 if any(shares[0] > 1e-6 for _, shares in named) else 1
    depths = range(first, len(named[0][1]))
    figure, (axes,) = figure_of(1, width=6.4)
    for way, (_, shares) in enumerate(named):
        bars = axes.bar(
            [depth + 0.4 * way for depth in depths],
            shares[first:],
            width=0.36,
            color=[depth_color(depth) for depth in depths],
            alpha=0.55 if way else 1.0,
            edgecolor=INK,
            linewidth=0.8,
            linestyle=":" if way else "-",
        )
        axes.bar_label(bars, fmt="{:.2f}", color=INK, fontsize=9)
    axes.set_xticks([depth + 0.2 * (len(named) - 1) for depth in depths], map(str, depths))
    if len(named) > 1:
        sides = (
            f"{side}: routed {n}" for side, (n, _) in zip(("left", "right"), named, strict=True)
        )
        axes.set_title(", ".join(sides), fontsize=9, loc="left", color=INK)
    axes.set_ylim(0, 1.1 * max(max(shares) for _, shares in named))
    axes.set_xlabel("recursion steps a token took")
    axes.set_ylabel("share of tokens")
    return figure


def routing_figure(rows: Sequence[Row]) -> Figure:
    """Shares of each step, agreement of the causal prediction, and dead positions."""
    routed = [row for row in rows if row.routing is not None]
    first = routed[0].routing
    assert first is not None
    panels = 3 if any(r.routing and r.routing.agreement for r in routed) else 2
    figure, axes = figure_of(panels)
    shares, dead = axes[0], axes[-1]
    mark = "o-" if len(routed) == 1 else "-"
    for step in range(1, len(first.shares) + 1):
        shares.plot(
            *_series(routed, lambda r, step=step: r.routing.shares[step - 1]),
            mark,
            color=depth_color(step),
            label=f"step {step}",
        )
        if panels == 3:
            axes[1].plot(
                *_series(routed, lambda r, step=step: r.routing.agreement.get(step)),
                mark,
                color=depth_color(step),
                label=f"step {step}",
            )
    dead.plot(*_series(routed, lambda r: r.routing.dead_positions), mark, color=WARNING)
    shares.set_title("share of tokens that run a step")
    legend(shares)
    if panels == 3:
        axes[1].set_title("agreement of causal prediction with top-k")
    dead.set_title("positions that never ran the last step")
    for one in axes:
        one.set_ylim(-0.03, 1.03)
        one.set_xlabel("optimizer step")
    return figure


def load_figure(routing: Routing, rows: Sequence[Row] = ()) -> Figure:
    """Load of each (step, expert) cell, and the largest load of each step during training."""
    load = routing.expert_load
    assert load is not None
    has_rows = any(row.routing and row.routing.expert_load for row in rows)
    figure, axes = figure_of(2 if has_rows else 1, width=4.6 if has_rows else 6.4)
    cells = axes[0]
    balanced = 1 / len(load[0])
    heat_map(cells, load, 2 * balanced, "recursion step", "expert")
    cells.set_title(f"share of a step's tokens (balanced: {balanced:.2f})")
    if has_rows:
        spread = axes[1]
        for step in range(len(load)):
            spread.plot(
                *_series(rows, lambda r, step=step: _largest_load(r, step)),
                color=depth_color(step + 1),
                label=f"step {step + 1}",
            )
        spread.axhline(1.0, linestyle="--", color=MUTED)
        spread.set_title("busiest expert's load ÷ balanced load")
        spread.set_xlabel("optimizer step")
        legend(spread)
    return figure


def _largest_load(row: Row, step: int) -> float | None:
    if row.routing is None or row.routing.expert_load is None:
        return None
    loads = row.routing.expert_load[step]
    return max(loads) * len(loads)


def _series(
    rows: Sequence[Row], value: Callable[[Row], float | None]
) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a value."""
    pairs = [(row.step, value(row)) for row in rows]
    kept = [(step, found) for step, found in pairs if found is not None]
    return [step for step, _ in kept], [found for _, found in kept]
