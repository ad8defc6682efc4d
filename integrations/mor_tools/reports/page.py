"""Self-contained HTML pages, without scripts and without external fonts or images."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mor_tools.reports.plots import DARK, LIGHT, palette, variables

MOST_TOKENS = 4000
"""Largest number of tokens of a text that a page shows. Figures use all tokens."""
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f5f6f7; %(light)s }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1f2226; %(dark)s } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--page) }
h1 { font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.25rem } p { margin: .4rem 0; max-width: 46rem }
figure { margin: 0; display: flex; flex-wrap: wrap; gap: 1rem 0 }
figure svg { width: 100%%; height: auto; display: block }
.scroll { overflow-x: auto } table { border-collapse: collapse }
td, th { padding: .15rem 1.2rem .15rem 0; vertical-align: top; text-align: left; font-weight: 400 }
thead th { color: var(--muted); font-size: .9rem } .number { text-align: right }
td.number, th.number { font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); padding: 1rem;
  font-size: 14px; line-height: 1.7; border-radius: 6px }
.note { color: var(--muted); font-size: .9rem }
.tokens span { border-radius: 3px } .tokens span:hover { outline: 2px solid var(--ink) }
.legend { display: flex; flex-wrap: wrap; gap: .4rem } .legend span { padding: .1rem .6rem;
  border-radius: 3px; font-size: .9rem }
%(classes)s
@media print { body { max-width: none } pre, .legend span, .tokens span { print-color-adjust: exact;
  -webkit-print-color-adjust: exact } h2 { break-after: avoid } figure { break-inside: avoid } }
"""


@dataclass(frozen=True)
class TokenView:
    """A token of a text and what a page shows about it."""

    text: str
    """Text of the token."""
    depth: int
    """Number of recursion steps that it took."""
    notes: Sequence[str] = ()
    """Further lines of its tooltip."""


def document(title: str, sections: Iterable[str], deepest: int) -> str:
    """A page with these sections, and with colors for depths up to `deepest`."""
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_style(deepest)}</style></head>\n<body><h1>{title}</h1>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def facts(values: Mapping[str, str]) -> str:
    """A table of names and values."""
    rows = (
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of numbers with a header row. The first column names the rows."""
    top = _cells("th", heads)
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>{body}</table></div>'


def passage(tokens: Sequence[TokenView], depth_shares: Mapping[int, float] | None = None) -> str:
    """A text whose tokens are colored by depth, below a legend of the colors.

    Args:
        depth_shares: share of tokens of each depth, for the legend.
    """
    depths = sorted({token.depth for token in tokens} | set(depth_shares or ()))
    keys = "".join(
        f'<span class="d{d}">{_steps(d)}'
        + (f" · {depth_shares.get(d, 0.0):.1%}" if depth_shares else "")
        + "</span>"
        for d in depths
    )
    shown = "".join(_token(token) for token in tokens[:MOST_TOKENS])
    note = ""
    if len(tokens) > MOST_TOKENS:
        note = (
            f'<p class="note">The first {MOST_TOKENS:,} of {len(tokens):,} tokens. Figures and '
            "tables use all tokens.</p>"
        )
    return f'<p class="legend">{keys}</p>\n{note}<pre class="tokens">{shown}</pre>'


def _token(token: TokenView) -> str:
    notes = "&#10;".join(html.escape(note) for note in (_steps(token.depth), *token.notes))
    return f'<span class="d{token.depth}" title="{notes}">{html.escape(token.text)}</span>'


def _steps(depth: int) -> str:
    return f"{depth} step" if depth == 1 else f"{depth} steps"


def _cells(tag: str, values: Sequence[str]) -> str:
    return "".join(
        f"<{tag}{' class=number' if column else ''}>{html.escape(value)}</{tag}>"
        for column, value in enumerate(values)
    )


def _style(deepest: int) -> str:
    named = {
        mode: variables(colors)
        + "".join(
            f"; --d{depth}: {color}; --t{depth}: {text}"
            for depth, (color, text) in enumerate(palette(deepest, mode))
        )
        for mode, colors in (("light", LIGHT), ("dark", DARK))
    }
    classes = "\n".join(
        f".d{d} {{ background: var(--d{d}); color: var(--t{d}) }}" for d in range(deepest + 1)
    )
    return _STYLE % {**named, "classes": classes}
