"""Figures as pixels, for tools that cannot show SVG."""

import numpy
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mor_tools.reports.plots import LIGHT, depth_color, palette

_COLORS = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")


def pixels(figure: Figure, deepest: int) -> numpy.ndarray:
    """The figure as an image `[height width 3]` on white, in the colors of a light page.

    Args:
        deepest: largest number of steps a token can take, which determines the colors of depths.
    """
    colors = LIGHT | {
        depth_color(depth): color for depth, (color, _) in enumerate(palette(deepest, "light"))
    }
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # this creates the ticks, which must be recolored, too
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
            continue  # the cells of a heat map have no placeholder colors
        if len(value) and str(value) != "none" and (new := colors.get(to_hex(value))):
            write(new)
