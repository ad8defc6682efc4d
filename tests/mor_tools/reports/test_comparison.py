"""The page that compares runs, and the command that writes it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mor_tools.commands import main
from mor_tools.commands.report import MOST_RUNS
from mor_tools.reports.comparison import ComparedRun, differences, loss_figure
from mor_tools.reports.rows import Row, line

ROWS = [
    Row(1, 6.5, 0.001, 1.2),
    Row(2, 6.1, 0.002, 1.1, 1000.0, None, 6.2, 6.25),
    Row(3, 5.9, 0.002, 1.0, 1500.0),
    Row(4, 5.5, 0.001, 0.9, 3000.0, None, 5.6),
]


def settings(steps: int = 4, **recursion: Any) -> dict[str, Any]:
    return {
        "output": f"runs/{steps}",
        "training": {"steps": steps, "global_batch_size": 16},
        "data": {"sequence_length": 100},
        "recursion": recursion or None,
    }


def written(folder: Path, rows=ROWS, summary=None, **changes: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"settings": settings(**changes)}))
    (folder / "history.jsonl").write_text("".join(map(line, rows)))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def test_a_page_compares_what_runs_came_to(tmp_path):
    done = written(tmp_path / "done", summary={"parameters": 12_345, "flops_per_token": 2e6})
    begun = written(tmp_path / "be<gun", steps=9, num_recursions=3)
    page = tmp_path / "page.html"
    main(["report", done, begun, "--output", str(page)])
    text = page.read_text("utf-8")
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text)
    of_done = ["done", "4", "6,400", "5.600", "–", "12,345", "2e+06", "1,500"]
    of_begun = ["be&lt;gun", "4 of 9", "6,400", "5.600", "–", "–", "–", "1,500"]
    assert cells[:16] == [*of_done, *of_begun]
    differing = [cells[i : i + 3] for i in range(16, len(cells), 3)]
    assert differing == [
        ["training.steps", "4", "9"],
        ["recursion", "None", "–"],
        ["recursion.num_recursions", "–", "3"],
    ]
    assert text.count("<svg") == 2  # losses over steps and over tokens
    used = set(re.findall(r"var\(--(\w+)\)", text))
    assert {"d1", "d2"} <= used <= set(re.findall(r"--(\w+):", text))


def test_curves_stand_over_steps_and_over_tokens():
    runs = [
        ComparedRun("small", ROWS, settings(), {}),
        ComparedRun("large", ROWS, settings() | {"data": {"sequence_length": 200}}, {}),
    ]
    over_steps, over_tokens = loss_figure(runs).axes
    for axes, ends in ((over_steps, (4, 4)), (over_tokens, (6400, 12800))):
        training, held_out = axes.lines[::2], axes.lines[1::2]
        assert [curve.get_xdata()[-1] for curve in training] == list(ends)
        assert [curve.get_xdata()[-1] for curve in held_out] == list(ends)
        assert training[0].get_ydata().tolist() == pytest.approx([6.5, 6.3, 37 / 6, 6.0])
        assert list(held_out[0].get_ydata()) == [6.2, 5.6]
    assert [text.get_text() for text in over_steps.get_legend().get_texts()] == ["small", "large"]


def test_runs_with_the_same_settings_differ_in_nothing_but_their_folder():
    assert differences([settings(), settings() | {"output": "elsewhere"}]) == {}


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    paths = [written(tmp_path / parent / "tiny") for parent in ("a", "b")]
    main(["report", *paths, "--output", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text("utf-8")
    assert all(f"<td>{path}</td>" in text for path in paths)


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    done = written(tmp_path / "done")
    empty = written(tmp_path / "empty", rows=[])
    damaged = written(tmp_path / "damaged")
    (tmp_path / "damaged" / "run.json").write_text("{")
    refusals = {
        (str(tmp_path),): "has no run.json, so it is no folder of a pretraining run",
        (done, empty): "has no steps in history.jsonl yet",
        (damaged,): "run.json is damaged",
        (done,) * (MOST_RUNS + 1): f"Compare at most {MOST_RUNS} at once",
    }
    for runs, message in refusals.items():
        with pytest.raises(SystemExit) as stopped:
            main(["report", *runs, "--output", str(tmp_path / "page.html")])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
