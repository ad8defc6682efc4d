"""The plot of costs shows the recorded figures and no others, in light and in dark."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import plot

ROOT = Path(__file__).parents[2]
RECORDS = [
    ROOT / "docs" / "measurements" / f"{name}.json" for name in ("training_step", "generation")
]
PICTURE = ROOT / "docs" / "pages" / "images" / "costs.svg"


def texts(drawing: str) -> list[str]:
    """What is written in a picture."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawing)


def test_the_picture_of_the_pages_is_the_one_of_the_records(tmp_path):
    drawn = tmp_path / "costs.svg"
    plot.main([*map(str, RECORDS), "--output", str(drawn)])
    redraw = f"python examples/benchmarks/plot.py {' '.join(map(str, RECORDS))} --output {PICTURE}"
    assert texts(drawn.read_text()) == texts(PICTURE.read_text()), redraw
    training, generation = (json.loads(file.read_text()) for file in RECORDS)
    shown = texts(PICTURE.read_text())
    for row in training["rows"]:
        assert f"{row['memory_ratio']:.2f}" in shown
        assert (f"{row['time']['ratio']:.2f}" in shown) or row["verdict"].startswith("none")
    for row in generation["rows"]:
        assert f"{row['throughput_ratio']:.2f}" in shown or row["budget"] != "equal_kv"
    for record in (training, generation):
        assert any(record["machine"]["processor"] in text for text in shown)


def test_colors_follow_the_reader():
    drawing = PICTURE.read_text()
    assert "prefers-color-scheme: dark" in drawing
    placeholders = set(re.findall(r"(?:fill|stroke): (#0e00\w\w)", drawing))
    for color in placeholders:
        assert drawing.count(f'fill: {color}"]') == 2, color  # a rule for each mode
    assert not re.search(r"(?:fill|stroke): #(?!0e00)\w{6}[;\"]", drawing.partition("</style>")[2])


def test_a_record_without_a_verdict_is_not_drawn():
    training, generation = (json.loads(file.read_text()) for file in RECORDS)
    for row in training["rows"]:
        row["verdict"] = "none: 40% of the processor"
    with pytest.raises(ValueError, match="quieter machine"):
        plot.figure(training, generation)
    with pytest.raises(ValueError, match="equal_kv"):
        plot.serving_rows({"rows": [{"budget": "equal_batch"}]})


def test_the_guide_has_the_recorded_figures():
    page = (ROOT / "docs" / "pages" / "choosing.md").read_text("utf-8")
    for row in json.loads(RECORDS[1].read_text())["rows"]:
        turns = f"{row['throughput_ratio']:.2f} | {row['turns'][0]:.2f}–{row['turns'][-1]:.2f}"
        assert f"| `{row['kv_policy']}` | {row['num_recursions']} | {turns} |" in page
    for row in json.loads(RECORDS[0].read_text())["rows"]:
        timed, start = row["time"], f"| `{row['kv_policy']}` | {row['num_recursions']} |"
        ending = f"| {row['flop_ratio']:.2f} | {row['memory_ratio']:.2f} |"
        lines = [line for line in page.splitlines() if line.startswith(start)]
        (line,) = (line for line in lines if line.endswith(ending))
        if not row["verdict"].startswith("none"):
            assert f"| {timed['ratio']:.2f} | {timed['low']:.2f}–{timed['high']:.2f} |" in line
