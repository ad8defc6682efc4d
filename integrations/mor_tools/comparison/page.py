"""compare.html for people, compare.md for documents, and compare.json for programs."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mor_layers import to_mapping
from mor_tools.comparison.figures import depth_figure, loss_figure, seed_figure
from mor_tools.comparison.plan import Comparison
from mor_tools.comparison.results import ModelResult, results
from mor_tools.comparison.tables import HEADS, cells, markdown, notes
from mor_tools.pretraining.run_folder import write_atomically
from mor_tools.reports.page import document, facts, table
from mor_tools.reports.plots import svg


def write_pages(comparison: Comparison, failed: Mapping[str, str] | None = None) -> list[Path]:
    """Write the three files from the runs that are finished; where they are.

    Args:
        failed: what went wrong with a run, by model and seed.
    """
    found, failed = results(comparison), failed or {}
    if not found:
        return []
    texts = {
        "compare.html": render(comparison, found, failed),
        "compare.md": "\n\n".join([markdown(found), *notes(comparison, found)]) + "\n",
        "compare.json": json.dumps(as_values(comparison, found, failed), indent=2) + "\n",
    }
    comparison.output.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(comparison.output / name, text)
    return [comparison.output / name for name in texts]


def render(comparison: Comparison, found: Sequence[ModelResult], failed: Mapping[str, str]) -> str:
    """The page as one HTML document."""
    names = [result.model.name for result in found]
    sections = [facts(_facts(comparison))]
    if failed:
        told = "".join(
            f"<li>{html.escape(run)}: {html.escape(why)}</li>" for run, why in failed.items()
        )
        sections += ["<h2>Runs that failed</h2>", f"<ul>{told}</ul>"]
    sections += ["<h2>Results</h2>", table(HEADS, [cells(result) for result in found])]
    sections += [f"<p>{html.escape(note)}</p>" for note in notes(comparison, found)]
    losses = loss_figure(found)
    sections += ["<h2>Held-out loss over FLOPs, tokens and time</h2>"]
    sections += [
        "<p>Lines are means over the seeds; bands reach from the lowest to the highest.</p>"
    ]
    sections.append(svg(losses, "held-out loss over FLOPs, tokens and seconds"))
    sections += ["<h2>Held-out loss of each seed</h2>", svg(seed_figure(found), "losses by seed")]
    if any(result.depth_shares for result in found):
        sections += ["<h2>Depth of held-out tokens</h2>"]
        sections.append(svg(depth_figure(found), "share of tokens of each depth"))
    deepest = max(
        [len(names) - 1, *(len(r.depth_shares) - 1 for r in found if r.depth_shares is not None)]
    )
    return document(f"Comparison of {', '.join(names)}", sections, deepest)


def as_values(
    comparison: Comparison, found: Sequence[ModelResult], failed: Mapping[str, str]
) -> dict[str, Any]:
    """The comparison as plain values."""
    return {
        "equal": list(comparison.equal),
        "budget": {comparison.budget_unit: comparison.budget},
        "seeds": list(comparison.seeds),
        "reference": comparison.models[0].name,
        "failed": dict(failed),
        "notes": notes(comparison, found),
        "models": [_model_values(result) for result in found],
    }


def _model_values(result: ModelResult) -> dict[str, Any]:
    costs, difference = result.model.costs, result.difference
    compared = None
    if difference is not None:
        compared = asdict(difference) | {
            "is_beyond_spread": difference.is_beyond_spread,
            "verdict": difference.verdict(),
        }
    return {
        "name": result.model.name,
        "parameters": result.runs[0].parameters,
        "kv_bytes_per_token": costs.kv_bytes,
        "flops_per_token": costs.flops_per_token,
        "steps": result.model.settings.training.steps,
        "held_out_loss": asdict(result.loss),
        "difference": compared,
        "depth_shares": result.depth_shares,
        "runs": [asdict(run) for run in result.runs],
        "settings": to_mapping(result.model.settings),
    }


def _facts(comparison: Comparison) -> dict[str, str]:
    first = comparison.models[0].settings
    unit = "FLOPs" if comparison.budget_unit == "flops" else "tokens"
    return {
        "Equal": ", ".join(comparison.equal),
        "Budget of a run": f"{comparison.budget:,.4g} {unit}",
        "Seeds": ", ".join(map(str, comparison.seeds)),
        "Reference": comparison.models[0].name,
        "Text": first.data.path or "the documentation that ships with Python",
        "Tokens per sequence": f"{first.data.sequence_length:,}",
        "Sequences per step": f"{first.training.global_batch_size:,}",
    }
