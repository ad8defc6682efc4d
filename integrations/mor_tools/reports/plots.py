"""SVG figures for a page, whose colors follow the reader's light or dark mode.

Figures are drawn with placeholder colors, which are replaced by CSS variables of the page in the
finished SVG. Depths have colors of viridis, whose order is also visible to color-blind readers.
"""

import io
import re
from collections.abc import Mapping, Sequence

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

INK, MUTED, ACCENT, SECOND, WARNING = (f"#0e00{i:02x}" for i in range(5))
"""Placeholders for the colors of text and axes, notes, the main line, a second line and a reference."""
_NAMES = ("ink", "muted", "accent", "second", "warning")
_VARIABLES = dict(zip((INK, MUTED, ACCENT, SECOND, WARNING), _NAMES, strict=True))
LIGHT = dict(zip(_VARIABLES, ("#1d1d1f", "#6b7078", "#21608f", "#a03b7c", "#b35400"), strict=True))
DARK = dict(zip(_VARIABLES, ("#e6e7e9", "#9aa0a9", "#6cb6ef", "#e58cc3", "#f0a04b"), strict=True))
"""The colors of the placeholders in each mode."""
_RANGES = {"light": (0.0, 0.88), "dark": (0.2, 1.0)}
"""The parts of viridis that have enough contrast on a light and on a dark page."""


def depth_color(depth: int) -> str:
    """The placeholder for the color of a depth."""
    return f"#0d00{depth:02x}"


def variables(mode: Mapping[str, str]) -> str:
    """CSS that defines the variables of a mode's colors."""
    return "; ".join(f"--{_VARIABLES[stand_in]}: {color}" for stand_in, color in mode.items())


def palette(depths: int, mode: str) -> list[tuple[str, str]]:
    """For each of the depths 0 .. `depths`, a color of viridis and a text color legible on it."""
    low, high = _RANGES[mode]
    colors = [
        colormaps["viridis"](low + (high - low) * i / max(depths, 1)) for i in range(depths + 1)
    ]
    return [(to_hex(color), text_on(color)) for color in colors]


def text_on(color: Sequence[float]) -> str:
    """Black or white, whichever has more contrast on an RGB color (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def figure_of(columns: int, width: float = 4.0, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    """A figure with `columns` panels side by side."""
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    figure.patch.set_alpha(0)
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        dress(axes)
    return figure, panels


def dress(axes: Axes) -> None:
    """Give axes the colors of the page."""
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, which="both")
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(INK)
    axes.title.set_fontsize(10.5)


def legend(axes: Axes, **options: object) -> None:
    """Add a legend in the colors of the page."""
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, **options)  # type: ignore[arg-type]


def heat_map(
    axes: Axes, values: Sequence[Sequence[float]], highest: float, rows: str, columns: str
) -> None:
    """Draw a heat map with a number in each cell. Rows are numbered from 1, columns from 0."""
    colors = colormaps["viridis"]
    height, width = len(values), len(values[0])
    axes.pcolormesh(values, cmap="viridis", vmin=0, vmax=highest, edgecolors="face", linewidth=0.3)
    axes.invert_yaxis()
    size = 9 if width <= 8 else 7 if width <= 16 else 0
    for row, cells in enumerate(values):
        for column, value in enumerate(cells if size else ()):
            text = text_on(colors(min(value / highest, 1.0)))
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{value:.2f}",
                ha="center",
                va="center",
                color=text,
                size=size,
            )
    every = max(1, width // 16)
    axes.set_xticks([i + 0.5 for i in range(0, width, every)], map(str, range(0, width, every)))
    axes.set_yticks([i + 0.5 for i in range(height)], [str(i + 1) for i in range(height)])
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def svg(figure: Figure, description: str) -> str:
    """The figure as an HTML element of the page: a drawing for each panel, side by side if they fit.

    On a phone, the panels are one below the other.
    """
    figure.draw_without_rendering()
    places = [axes.get_position() for axes in figure.axes]
    figure.set_layout_engine("none")  # what is hidden below must not move the rest
    for axes, place in zip(figure.axes, places, strict=True):
        axes.set_position(place)
    drawings = [_panel(figure, axes, description) for axes in figure.axes]
    for axes in figure.axes:
        axes.set_visible(True)
    return f'<figure role="img" aria-label="{description}">{"".join(drawings)}</figure>'


def _panel(figure: Figure, axes: Axes, description: str) -> str:
    """One panel of a figure whose layout is fixed."""
    for other in figure.axes:
        other.set_visible(other is axes)
    buffer, number = io.StringIO(), figure.axes.index(axes)
    with rc_context({"svg.hashsalt": f"{description} {number}"}):
        metadata = {"Date": None}
        figure.savefig(
            buffer, format="svg", metadata=metadata, bbox_inches="tight", pad_inches=0.06
        )
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    # Make the ids of the drawing unique, because two drawings of a page must not share ids.
    prefix = f"{_slug(description)}-{number}-"
    drawing = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{prefix}", drawing)
    for color, name in _VARIABLES.items():
        drawing = drawing.replace(color, f"var(--{name})")
    drawing = re.sub(r"#0d00([0-9a-f]{2})", lambda found: f"var(--d{int(found[1], 16)})", drawing)
    points = re.search(r'width="([\d.]+)pt"', drawing)
    assert points is not None, "matplotlib writes the width of a drawing in points"
    width = float(points[1]) / 72  # inches
    # The limits of the width keep the text legible; a page that is narrower than them has all of it.
    size = f"flex: 1 1 {4.2 * width:.1f}rem; max-width: min(100%, {5.6 * width:.1f}rem)"
    return f'<div style="{size}">{drawing}</div>'


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text)
