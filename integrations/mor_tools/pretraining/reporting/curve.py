"""A curve of numbers, drawn with characters of a terminal."""

from collections.abc import Sequence
from itertools import pairwise

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of the dots of a Braille character, by column and by row from the top."""
_BLANK = 0x2800
_ROWS, _COLUMNS = 4, 2
"""Dots of a character."""


def curve(values: Sequence[float], width: int, height: int) -> list[str]:
    """Lines of text that draw the values from left to right, between their smallest and largest.

    Args:
        values: finite numbers, at least one. Where there are more than dots, a dot is their mean.
        width, height: of the drawing, in characters.
    """
    columns, rows = width * _COLUMNS, height * _ROWS
    means = _means(values, columns)
    low, high = min(means), max(means)
    scale = (rows - 1) / (high - low) if high > low else 0.0
    bits = [[0] * width for _ in range(height)]
    above = None
    for column, mean in enumerate(means):
        row = round((high - mean) * scale)
        # A line goes on from the dot before, so that a steep curve has no gaps.
        nearest = row if above is None else above + (row > above) - (row < above)
        for dot in range(min(row, nearest), max(row, nearest) + 1):
            bits[dot // _ROWS][column // _COLUMNS] |= _DOTS[column % _COLUMNS][dot % _ROWS]
        above = row
    return ["".join(chr(_BLANK + cell) for cell in line) for line in bits]


def _means(values: Sequence[float], most: int) -> list[float]:
    """The values, or the means of `most` parts of them that follow each other."""
    if len(values) <= most:
        return list(values)
    edges = [i * len(values) // most for i in range(most + 1)]
    parts = [values[start:end] for start, end in pairwise(edges)]
    return [sum(part) / len(part) for part in parts]
