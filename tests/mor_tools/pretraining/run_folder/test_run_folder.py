"""The folder of a run that is damaged says so in plain words, or is read as far as it goes."""

import json
from pathlib import Path

import pytest

from mor_tools.pretraining import run_folder
from mor_tools.pretraining.command_line import load_settings
from mor_tools.pretraining.data.text import PreparedText
from mor_tools.pretraining.reporting.history import History
from mor_tools.reports.rows import Row, line
from tests.mor_tools.pretraining.runs import TINY


@pytest.mark.parametrize(
    "content", [b"{}", b"", b"[]", b"\xff{}", b'{"settings": 1, "text": "a"}', b'{"settings": {}}']
)
def test_a_damaged_run_json_is_named(tmp_path: Path, content: bytes):
    settings = load_settings(["--config", TINY, f"output={tmp_path}"])
    text = PreparedText(tmp_path / "prepared" / "key" / "text", tmp_path / "tokenizer.json")
    (tmp_path / "run.json").write_bytes(content)
    for read in (
        lambda: run_folder.is_complete(settings),
        lambda: run_folder.claim(settings, text),
    ):
        with pytest.raises(
            ValueError, match=r"run\.json is damaged: it does not contain the settings"
        ):
            read()
    (tmp_path / "run.json").unlink()
    run_folder.claim(settings, text)
    assert json.loads((tmp_path / "run.json").read_text())["text"] == str(text.prefix)


def rows(*steps: int) -> bytes:
    return "".join(line(Row(step, 1.0, 0.1, 1.0)) for step in steps).encode()


@pytest.mark.parametrize(
    ("content", "kept", "lost"),
    [
        (rows(1, 2, 3, 4, 5), [1, 2, 3, 4], None),
        (rows(1, 2, 3, 4, 5)[:-20], [1, 2, 3, 4], None),  # killed while it wrote the last line
        (rows(1, 2, 3), [1, 2, 3], "lacks 1 of the 4 steps taken so far, between steps 4 and 4"),
        (rows(1, 2)[:-20], [1], "lacks 3 of the 4 steps taken so far, between steps 2 and 4"),
        (rows(1) + b'{"st\xff\n' + rows(3, 4), [1, 3, 4], "lacks 1 of the 4 steps"),
        (None, [], "lacks 4 of the 4 steps taken so far, between steps 1 and 4"),
    ],
)
def test_rows_that_a_history_lost_are_said(
    tmp_path: Path, content: bytes | None, kept: list[int], lost: str | None
):
    if content is not None:
        (tmp_path / "history.jsonl").write_bytes(content)
    history = History(tmp_path, step=4)
    assert [row.step for row in history.rows] == kept
    if lost is None:
        assert history.lost is None
    else:
        assert history.lost is not None and lost in history.lost


def test_a_folder_of_checkpoints_that_cannot_be_written_is_named(tmp_path: Path):
    settings = load_settings(["--config", TINY, f"output={tmp_path}"])
    assert run_folder.put_in_order(settings) == ()
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OSError, match=r"checkpoints cannot be written: .*Choose another output="):
        run_folder.put_in_order(settings)
