"""The page of `mor inspect`, which shows what a model does with each token of a text."""

import math
from collections.abc import Sequence

from mor_layers.inspection import Inspection
from mor_tools.reports import training_figures
from mor_tools.reports.inspection_figures import figures
from mor_tools.reports.page import TokenView, document, facts, passage, table
from mor_tools.reports.plots import svg
from mor_tools.reports.rows import Row

_EXPLAINED = {
    "Depth of tokens": "The number of recursion steps that tokens take, routed as in generation and "
    "as in training, where routing may depend on later tokens.",
    "Depth against surprise": "Boxes show the quartiles and the median, whiskers the 5th and the "
    "95th percentile, and the dot the mean. If the model spent more steps on harder tokens, the "
    "boxes would rise to the right.",
    "Router scores": "The scores of all candidates of a step. A token runs the step if its score is "
    "above the dashed line. If there is no line, the router does not use a threshold.",
    "Load per recursion step and expert": "Summed over all layers of the recursion.",
}


def render(seen: Inspection, texts: Sequence[str], title: str, rows: Sequence[Row] = ()) -> str:
    """The page as one HTML document.

    Args:
        texts: the text of each token.
        rows: the rows of the training run of the model, if known.
    """
    sections = [facts(_facts(seen)), "<h2>Steps</h2>", _steps(seen), "<h2>Depth of each token</h2>"]
    sections.append(
        "<p>Hover over a token to see its depth, its surprise and its router scores. Tokens are "
        "routed as in generation.</p>"
    )
    shares = {d: s for d, s in enumerate(seen.depth_shares) if s > 0}
    sections.append(passage(_tokens(seen, texts), shares))
    for name, figure in figures(seen).items():
        sections += [f"<h2>{name}</h2>", f"<p>{_EXPLAINED[name]}</p>", svg(figure, name)]
    if rows:
        description = "losses over optimizer steps"
        figure = training_figures.loss_figure(rows)
        sections += ["<h2>Training: loss</h2>", svg(figure, description)]
    routed = [row.routing for row in rows if row.routing is not None]
    if routed:
        description = "routing over optimizer steps"
        figure = training_figures.routing_figure(rows)
        sections += ["<h2>Training: routing</h2>", svg(figure, description)]
    if routed and routed[-1].expert_load is not None:
        description = "load of experts over optimizer steps"
        figure = training_figures.load_figure(routed[-1], rows)
        sections += ["<h2>Training: load, at the last logged step</h2>", svg(figure, description)]
    deepest = max([seen.num_recursions, *(len(routing.shares) for routing in routed)])
    return document(title, sections, deepest)


def scalars(seen: Inspection) -> dict[str, float]:
    """The numbers of an inspection, by their names in TensorBoard and wandb."""
    found = {
        "inspect/surprise": seen.mean_surprise,
        "inspect/depth_surprise_correlation": seen.surprise_correlation,
        "inspect/depth_outlook_correlation": seen.outlook_correlation,
    }
    named = {
        "share": seen.shares,
        "training_share": seen.training_shares,
        "dead": seen.dead_shares,
        "agreement": seen.agreement,
    }
    for name, values in named.items():
        found |= {f"inspect/step_{r}/{name}": value for r, value in enumerate(values, start=1)}
    found |= {f"inspect/depth/{d}": s for d, s in enumerate(seen.depth_shares)}
    for step, cells in enumerate([] if seen.cell_shares is None else seen.cell_shares.tolist(), 1):
        found |= {f"inspect/experts/step_{step}/expert_{e}": s for e, s in enumerate(cells)}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _facts(seen: Inspection) -> dict[str, str]:
    windows = -(-len(seen.ids) // seen.window)
    return {
        "Tokens": f"{len(seen.ids):,} in {windows} window{'s' if windows > 1 else ''} of at most "
        f"{seen.window:,}",
        "Mean surprise": f"{seen.mean_surprise:.3f} nats per token",
        "Mean depth": f"{seen.depths.float().mean():.2f} of {seen.num_recursions} steps",
        "Rank correlation of depth with surprise": f"{_signed(seen.surprise_correlation)} of the "
        f"token itself, {_signed(seen.outlook_correlation)} of the token after it",
    }


def _steps(seen: Inspection) -> str:
    heads = ["step", "share of tokens", "in training", "agreement", "dead tokens", "threshold"]
    names = [str(step) for step in range(1, seen.num_recursions + 1)]
    if len(seen.steps) > 1:
        heads[0] = "step (recursion)"
        owners = (owner for owner, count in enumerate(seen.steps, start=1) for _ in range(count))
        names = [f"{name} ({owner})" for name, owner in zip(names, owners, strict=True)]
    columns = zip(
        seen.shares,
        seen.training_shares,
        seen.agreement,
        seen.dead_shares,
        seen.thresholds,
        strict=True,
    )
    rows = (
        [
            name,
            *(f"{share:.1%}" for share in shares),
            "–" if threshold is None else f"{threshold:.3g}",
        ]
        for name, (*shares, threshold) in zip(names, columns, strict=True)
    )
    return (
        table(heads, rows)
        + '<p class="note">Agreement: the share of candidates in training for which generation makes '
        "the same decision. Dead: the share of positions in a window that never run the step.</p>"
    )


def _tokens(seen: Inspection, texts: Sequence[str]) -> list[TokenView]:
    views = []
    for index, text in enumerate(texts):
        surprise = seen.surprise[index].item()
        notes = [repr(text), f"surprise {surprise:.2f} nats" if index else "first token"]
        for step, score in enumerate(seen.scores[:, index].tolist(), start=1):
            if not math.isnan(score):
                notes.append(f"score for step {step}: {score:.4f}")
        views.append(TokenView(text, int(seen.depths[index]), notes))
    return views


def _signed(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:+.3f}"
