"""Compare pretraining runs on one HTML page: losses, speed and settings that differ.

    mor report runs/dense runs/recursive --output comparison.html

Runs need not be complete. The page of a single run is the report.html that the run itself writes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mor_tools import terminal
from mor_tools.formats import RUN_CLAIM
from mor_tools.reports.comparison import ComparedRun, render
from mor_tools.reports.rows import read_rows

MOST_RUNS = 20
"""More lines in a figure cannot be told apart."""


def run(options: argparse.Namespace) -> None:
    """Compare.

    Raises:
        ValueError: a folder is no run, has no steps yet, or there are too many.
        OSError: a file cannot be read or written.
    """
    if len(options.runs) > MOST_RUNS:
        raise ValueError(
            f"{len(options.runs)} runs are given. Compare at most {MOST_RUNS} at once."
        )
    compared = [
        read(folder, name) for folder, name in zip(options.runs, _names(options.runs), strict=True)
    ]
    output = options.output or Path("comparison.html")
    with terminal.working(f"comparing {len(compared)} runs"):
        output.write_text(render(compared), "utf-8")
    print(f"wrote {output}")


def read(folder: Path, name: str) -> ComparedRun:
    """The run in a folder, under a name.

    Raises:
        ValueError: the folder is no run, has no steps yet, or its files are damaged.
    """
    claim = _json(folder / RUN_CLAIM)
    if claim is None or "settings" not in claim:
        raise ValueError(f"{folder} has no {RUN_CLAIM}, so it is no folder of a pretraining run.")
    rows = read_rows(folder / "history.jsonl")
    if not rows:
        raise ValueError(f"{folder} has no steps in history.jsonl yet. Compare it later.")
    return ComparedRun(name, rows, claim["settings"], _json(folder / "summary.json") or {})


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {error}. Restore it, or leave the run out."
        ) from error


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or whole paths where two runs would have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
