"""Figures as pixels, for places that show no SVG."""

import numpy
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mor_tools.reports.plots import LIGHT, depth_color, palette

_COLORS = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")


def pixels(figure: Figure, deepest: int) -> numpy.ndarray:
    """`[height width 3]` on white; the figure's stand-ins become the colours of a light page.

    Args:
        deepest: most steps a token can take, as for the page's colours.
    """
    colors = LIGHT | {
        depth_color(depth): color for depth, (color, _) in enumerate(palette(deepest, "light"))
    }
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # ticks exist from now on
    for artist in figure.findobj():
        _recolor(artist, colors)
    figure.patch.set(facecolor="white", alpha=1.0)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


def _recolor(artist: Artist, colors: dict[str, str]) -> None:
    for name in _COLORS:
        read, write = (getattr(artist, f"{verb}_{name}", None) for verb in ("get", "set"))
        if read is None or write is None:
            continue
        value = read()
        if isinstance(value, numpy.ndarray) and value.ndim > 1:
            continue  # a heat map's cells have colours of their own
        if len(value) and str(value) != "none" and (new := colors.get(to_hex(value))):
            write(new)
