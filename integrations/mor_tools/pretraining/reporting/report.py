"""report.html: the results of a run for people, as one self-contained file."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from mor_tools.pretraining.reporting.demonstration import TokenDepth
from mor_tools.reports.health import Finding
from mor_tools.reports.page import TokenView, document, facts, passage
from mor_tools.reports.plots import svg
from mor_tools.reports.rows import Row, Validation
from mor_tools.reports.training_figures import (
    depth_figures,
    load_figure,
    loss_figure,
    routing_figure,
)


@dataclass(frozen=True)
class Report:
    """The content of the report."""

    title: str
    """Name of the run."""
    facts: dict[str, str]
    """Name and value of each row of the table at the top."""
    rows: Sequence[Row]
    """The run, step by step."""
    unigram_entropy: float
    """Of the held-out text, in nats per token."""
    validation: Validation
    """Validation of the trained model."""
    passage: Sequence[TokenDepth]
    """A held-out passage with depths; empty without recursion."""
    sample: str
    """Prompt and continuation; may be empty."""
    findings: Sequence[Finding] = ()
    """Problems that were found, if any."""


def render(report: Report) -> str:
    """The report as one HTML document."""
    routing = report.validation.routing
    losses = loss_figure(report.rows, report.unigram_entropy)
    sections = [facts(report.facts)]
    if report.findings:
        told = "".join(
            f"<li>From step {finding.step:,}: {html.escape(finding.message)}</li>"
            for finding in report.findings
        )
        sections += ["<h2>Warnings</h2>", f"<ul>{told}</ul>"]
    sections.append("<h2>Loss</h2>")
    sections.append(svg(losses, "training and held-out loss over optimizer steps"))
    depths = depth_figures(report.validation)
    for number, figure in enumerate(depths, start=1):
        where = "" if len(depths) == 1 else f" in recursion {number}"
        sections += [f"<h2>Depth of held-out tokens{where}</h2>"]
        sections.append(svg(figure, f"histogram of depths{where}"))
    if any(row.routing for row in report.rows):
        over_time = routing_figure(report.rows)
        sections += ["<h2>Routing during training</h2>"]
        sections.append(svg(over_time, "routing over optimizer steps"))
    if routing is not None and routing.expert_load is not None:
        load = load_figure(routing, report.rows)
        sections += ["<h2>Load per recursion step and expert</h2>"]
        sections.append(svg(load, "load of experts per recursion step"))
    if report.passage:
        views = [TokenView(token.text, token.depth) for token in report.passage]
        sections += ["<h2>Depth of each token in held-out text</h2>", passage(views)]
    if report.sample:
        sections += ["<h2>A continuation</h2>", f"<pre>{html.escape(report.sample)}</pre>"]
    deepest = max(
        [len(row.routing.shares) for row in report.rows if row.routing is not None]
        + [len(routing.shares) if routing is not None else 0]
        + [token.depth for token in report.passage]
    )
    return document(report.title, sections, deepest)
