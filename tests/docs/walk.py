"""Replays first tasks from the pages of the documentation, as a newcomer would type them.

`python -m tests.docs.walk [--list] [part of a task's name ...]`, or `make walk`. A page marks the code
blocks of a task with a comment right above each of them:

    <!-- walk: extend a run -->
    <!-- walk: extend a run; training.steps=800 -> training.steps=6 -->

The second form replaces text in that block, so that a training of minutes takes seconds. What a task
needs and its page does not show, such as a finished run, stands in the comment itself:

    <!-- walk: extend a run
    mor pretrain --config examples/configs/tiny.yaml training.steps=4
    -->

Each task runs in a copy of the checkout of its own, with the commands `python`, `mor` and `torchrun` of
the environment that runs this. The blocks are Bash or Python; Python blocks that follow each other share
their names. The time of each task is printed, and the last line says how many tasks failed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "pages"
MARK = re.compile(
    r"^<!-- walk: (?P<task>[^;\n]+?)(?:; (?P<old>.+?) -> (?P<new>.+?))? ?"
    r"(?:-->\n+```(?P<language>\w+)\n(?P<code>.*?)^```|\n(?P<hidden>.*?)^-->)",
    re.MULTILINE | re.DOTALL,
)
LANGUAGES = {
    "bash": ["bash", "-euo", "pipefail", "-c"],
    "python": [sys.executable, "-c"],
}
MOST_SECONDS = 600
SHOWN_LINES = 40


@dataclass(frozen=True)
class Block:
    """Code that is run at once."""

    language: str
    code: str


@dataclass
class Task:
    """What a newcomer does by following one page."""

    name: str
    page: Path
    blocks: list[Block] = field(default_factory=list)


def tasks_of(page: Path) -> list[Task]:
    """The tasks of a page, in the order in which they begin.

    Raises:
        ValueError: a mark belongs to no block, or names text that its block does not have.
    """
    text = page.read_text("utf-8")
    found: dict[str, Task] = {}
    marks = list(MARK.finditer(text))
    if len(marks) != text.count("<!-- walk:"):
        raise ValueError(f"{page.name}: a mark `<!-- walk: ... -->` has no code block below it.")
    for mark in marks:
        code, language = mark["code"], mark["language"]
        if code is None:
            code, language = mark["hidden"], "bash"
        if language not in LANGUAGES:
            raise ValueError(f"{page.name}: {mark['task']!r} has a block of {language}, not of "
                             f"{' or '.join(LANGUAGES)}.")  # fmt: skip
        if mark["old"] is not None:
            if mark["old"] not in code:
                raise ValueError(f"{page.name}: no {mark['old']!r} in a block of {mark['task']!r}.")
            code = code.replace(mark["old"], mark["new"])
        task = found.setdefault(mark["task"], Task(mark["task"], page))
        task.blocks.append(Block(language, code))
    return list(found.values())


def all_tasks() -> list[Task]:
    """The tasks of all pages."""
    return [task for page in sorted(PAGES.rglob("*.md")) for task in tasks_of(page)]


def walk(task: Task, checkout: Path = ROOT) -> str | None:
    """Do a task in a copy of the checkout; returns what went wrong, or None."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkout"
        copy(checkout, place)
        environment = environment_of(place, Path(folder) / "bin")
        for language, blocks in groupby(task.blocks, key=lambda block: block.language):
            codes = [block.code for block in blocks]
            for code in codes if language == "bash" else ["\n".join(codes)]:
                done = subprocess.run(
                    [*LANGUAGES[language], code],
                    cwd=place,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=MOST_SECONDS,
                )
                if done.returncode:
                    last = "\n".join(done.stdout.splitlines()[-SHOWN_LINES:])
                    return f"exit status {done.returncode} of:\n{code}\n{last}"
    return None


def copy(checkout: Path, place: Path) -> None:
    """Copy the files of a checkout that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (checkout / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(checkout / name, place / name)


def environment_of(place: Path, bin_folder: Path) -> dict[str, str]:
    """What `eval "$(make -s env)"` gives to a shell."""
    bin_folder.mkdir()
    mor = bin_folder / "mor"
    mor.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mor_tools.commands "$@"\n')
    mor.chmod(0o755)
    path = os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {
        "PATH": path,
        "PYTHONPATH": f"{place}:{place / 'integrations'}",
        "PYTHON": sys.executable,  # for `make`
        "OMP_NUM_THREADS": "1",
    }


def main(arguments: Sequence[str]) -> int:
    """Walk through the tasks; returns how many failed."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--list", action="store_true", help="show the tasks and exit")
    options.add_argument("names", nargs="*", help="only tasks whose names contain one of these")
    chosen = options.parse_args(arguments)
    tasks = [
        task
        for task in all_tasks()
        if not chosen.names or any(name in task.name for name in chosen.names)
    ]
    if not tasks:
        options.error("no task has such a name; --list shows them")
    failed = 0
    for number, task in enumerate(tasks, start=1):
        title = f"{number}/{len(tasks)} {task.name} ({task.page.relative_to(PAGES)})"
        if chosen.list:
            print(title)
            continue
        print(f"{title} ...", flush=True)
        began = time.monotonic()
        problem = walk(task)
        outcome = "done" if problem is None else "FAILED"
        print(f"    {outcome} in {time.monotonic() - began:.0f} s", flush=True)
        if problem is not None:
            failed += 1
            print(problem, flush=True)
    if not chosen.list:
        print(f"{len(tasks) - failed} of {len(tasks)} tasks were done, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
