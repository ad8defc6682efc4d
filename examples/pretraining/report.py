"""report.html: what a run came to, for people. One file that needs nothing beside it."""

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretraining.demonstration import TokenDepth
from pretraining.history import Row, Validation

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h2 { margin-top: 2.5rem } figure { margin: 0 } svg { max-width: 100%; height: auto }
table { border-collapse: collapse } td { padding: .15rem 1.5rem .15rem 0; vertical-align: top }
pre { white-space: pre-wrap; background: #f6f6f6; padding: 1rem; font-size: 14px }
pre span { border-radius: 2px } .legend span { padding: .1rem .6rem; margin-right: .5rem }
"""


@dataclass(frozen=True)
class Report:
    """Everything the report shows."""

    title: str
    """Name of the run."""
    facts: dict[str, str]
    """Name and value of each line of the table at the top."""
    rows: Sequence[Row]
    """The run, step by step."""
    unigram_entropy: float
    """Of the held-out text, in nats per token."""
    validation: Validation
    """Of the trained model."""
    passage: Sequence[TokenDepth]
    """A held-out passage; empty without recursion."""
    sample: str
    """Prompt and continuation; may be empty."""


def render(report: Report) -> str:
    """The report as one HTML document."""
    facts = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in report.facts.items()
    )
    sections = [f"<table>{facts}</table>", "<h2>Loss</h2>", _loss_figure(report)]
    if report.validation.routing is not None:
        sections += ["<h2>Depth</h2>", _depth_figure(report.validation)]
    if any(row.routing for row in report.rows):
        sections += ["<h2>Routing during training</h2>", _routing_figure(report.rows)]
    if report.validation.routing is not None and report.validation.routing.expert_load is not None:
        sections += ["<h2>Load per recursion step and expert</h2>", _load_figure(report)]
    if report.passage:
        sections += ["<h2>Depth of each token in held-out text</h2>", _passage(report.passage)]
    if report.sample:
        sections += ["<h2>A continuation</h2>", f"<pre>{html.escape(report.sample)}</pre>"]
    title = html.escape(report.title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{'\n'.join(sections)}\n"
        "</body></html>\n"
    )


def _loss_figure(report: Report) -> str:
    figure, (axes,) = _figure(1)
    axes.plot(*_series(report.rows, lambda r: r.loss), color="#9ecae1", label="training")
    axes.plot(
        *_series(report.rows, lambda r: r.validation_loss), "o-", color="#08519c", label="held out"
    )
    causal = _series(report.rows, lambda r: r.causal_validation_loss)
    if causal[0]:
        axes.plot(*causal, "s:", color="#6a51a3", label="held out, routed as in generation")
    axes.axhline(report.unigram_entropy, linestyle="--", color="#d94801", label="unigram entropy")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False)
    return _svg(figure, "training and held-out loss over optimizer steps")


def _depth_figure(validation: Validation) -> str:
    ways = [("as in training", validation.routing), ("as in generation", validation.causal_routing)]
    named = [(name, routing.depth_shares) for name, routing in ways if routing is not None]
    figure, (axes,) = _figure(1)
    first = 0 if any(shares[0] > 0 for _, shares in named) else 1
    for way, (name, shares) in enumerate(named):
        depths = range(first, len(shares))
        bars = axes.bar(
            [depth + 0.4 * way for depth in depths],
            shares[first:],
            width=0.36,
            color=[_color(depth) for depth in depths],
            hatch="//" if way else None,
            edgecolor="#777",
            label=f"routed {name}",
        )
        axes.bar_label(bars, fmt="{:.2f}")
    axes.set_xticks([depth + 0.2 * (len(named) - 1) for depth in depths], map(str, depths))
    axes.legend(frameon=False)
    axes.set_xlabel("recursion steps a token took")
    axes.set_ylabel("share of held-out tokens")
    return _svg(figure, "histogram of depths")


def _routing_figure(rows: Sequence[Row]) -> str:
    """Shares per step, how well the selection can be foreseen, and positions left out."""
    routed = [row for row in rows if row.routing is not None]
    assert routed[0].routing is not None
    steps = range(len(routed[0].routing.shares))
    figure, (shares, accuracy, dead) = _figure(3)
    for step in steps:
        shares.plot(
            *_series(routed, lambda r, step=step: r.routing.shares[step]),
            color=_color(step + 1),
            label=f"step {step + 1}",
        )
        name = f"step_{step + 1}/sampling_accuracy"
        accuracy.plot(
            *_series(routed, lambda r, name=name: r.routing.metrics.get(name)),
            color=_color(step + 1),
        )
    dead.plot(*_series(routed, lambda r: r.routing.dead_positions), color="#d94801")
    shares.set_title("share of tokens that run a step")
    shares.legend(frameon=False)
    accuracy.set_title("accuracy of foreseeing the selection")
    dead.set_title("positions that never ran the last step")
    for axes in (shares, accuracy, dead):
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("optimizer step")
    return _svg(figure, "routing over optimizer steps")


def _load_figure(report: Report) -> str:
    """Load of each (step, expert) cell on held-out text, and the cells' spread during training."""
    load = report.validation.routing and report.validation.routing.expert_load
    assert load is not None
    figure, (cells, spread) = _figure(2)
    balanced = 1 / len(load[0])
    cells.imshow(load, cmap="Blues", vmin=0, vmax=2 * balanced, aspect="auto")
    for step, experts in enumerate(load):
        for expert, share in enumerate(experts):
            dark = share > 1.4 * balanced
            cells.text(
                expert, step, f"{share:.2f}", ha="center", va="center", color="w" if dark else "k"
            )
    cells.set_xticks(range(len(load[0])))
    cells.set_yticks(range(len(load)), range(1, len(load) + 1))
    cells.set_xlabel("expert")
    cells.set_ylabel("recursion step")
    cells.set_title(f"share of a step's tokens (balanced: {balanced:.2f})")
    for step in range(len(load)):
        spread.plot(
            *_series(report.rows, lambda r, step=step: _largest_load(r, step)),
            color=_color(step + 1),
            label=f"step {step + 1}",
        )
    spread.axhline(1.0, linestyle="--", color="#999")
    spread.set_title("busiest expert's load ÷ balanced load")
    spread.set_xlabel("optimizer step")
    spread.legend(frameon=False)
    return _svg(figure, "load of experts per recursion step")


def _largest_load(row: Row, step: int) -> float | None:
    if row.routing is None or row.routing.expert_load is None:
        return None
    loads = row.routing.expert_load[step]
    return max(loads) * len(loads)


def _passage(passage: Sequence[TokenDepth]) -> str:
    depths = sorted({token.depth for token in passage})
    legend = "".join(f'<span style="background:{_color(d)}">{d} steps</span>' for d in depths)
    tokens = "".join(
        f'<span style="background:{_color(token.depth)}" title="{token.depth} steps">'
        f"{html.escape(token.text)}</span>"
        for token in passage
    )
    return f'<p class="legend">{legend}</p>\n<pre>{tokens}</pre>'


def _color(depth: int) -> str:
    """One colour per depth; dark text stays readable on it."""
    scale = ("#d9d9d9", "#fdd49e", "#fc8d59", "#74c476", "#6baed6", "#9e9ac8", "#f768a1")
    return scale[min(depth, len(scale) - 1)]


def _series(rows, value):
    """Steps and values of the rows that have one."""
    pairs = [(row.step, value(row)) for row in rows]
    return tuple(zip(*[pair for pair in pairs if pair[1] is not None], strict=True)) or ((), ())


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.2 if columns > 1 else 8, 3.6), layout="constrained")
    figure.set_figwidth(8 if columns == 1 else 4.6 * columns)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _svg(figure: Figure, description: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    return f'<figure role="img" aria-label="{description}">{drawing}</figure>'
