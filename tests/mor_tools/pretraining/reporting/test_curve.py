"""The curve of losses on a terminal."""

from mor_tools.pretraining.reporting.curve import curve


def dots(lines: list[str]) -> list[str]:
    """The drawing with one character for each dot."""
    bits = ((0, 3), (1, 4), (2, 5), (6, 7))
    return [
        "".join("x" if (ord(cell) - 0x2800) >> bit & 1 else "." for cell in line for bit in pair)
        for line in lines
        for pair in bits
    ]


def test_a_falling_curve_falls_from_corner_to_corner():
    assert dots(curve([3.0, 2.0, 1.0, 0.0], width=2, height=1)) == ["x...", ".x..", "..x.", "...x"]


def test_steep_curves_have_no_gaps():
    assert dots(curve([1.0, 0.0], width=1, height=2)) == ["x.", *[".x"] * 7]
    assert dots(curve([0.0, 1.0], width=1, height=1)) == [".x", ".x", ".x", "x."]


def test_many_values_are_averaged_and_few_leave_room():
    assert curve([4.0, 2.0, 2.0, 0.0], width=1, height=1) == curve([3.0, 1.0], width=1, height=1)
    assert dots(curve([1.0, 1.0], width=2, height=1)) == ["xx..", "....", "....", "...."]
    assert dots(curve(list(range(1000)), width=10, height=5))[0].endswith("x")
