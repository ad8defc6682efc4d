"""Each tutorial runs from its page: its bash and Python blocks in order, as a reader would type them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_pages import ROOT

TUTORIALS = sorted((ROOT / "docs" / "pages" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LONGEST_TO_READ = 1000
"""Words and numbers outside of code: five minutes at the pace of technical prose, which leaves five for
typing."""

# Python blocks of a page share names, as in one session; bash blocks run in shells of their own.
RUNNER = """
import json, subprocess, sys

import torch

torch.set_num_threads(1)
shell = 'mor() { python -m mor_tools.commands "$@"; }\\n'
names = {"__name__": "__main__"}
for language, line, code in json.load(sys.stdin):
    print(f"--- {language} block at line {line}", flush=True)
    if language == "bash":
        subprocess.run(["bash", "-euc", shell + code], check=True)
    else:
        exec(compile("\\n" * line + code, "tutorial", "exec"), names)
"""


def blocks_of(page: Path) -> list[tuple[str, int, str]]:
    """Language, line and code of each block that a reader runs."""
    text = page.read_text("utf-8")
    found = BLOCK.finditer(text)
    return [(block[1], text[: block.start()].count("\n") + 1, block[2]) for block in found]


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_takes_less_than_ten_minutes_to_read_and_type(page):
    prose = BLOCK.sub("", page.read_text("utf-8"))
    code = "".join(code for _, _, code in blocks_of(page))
    assert len(re.findall(r"\w+", prose)) < LONGEST_TO_READ
    assert len(code.splitlines()) < 130


@pytest.mark.full
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_from_its_page(page, tmp_path):
    blocks = blocks_of(page)
    if page.stem == "index":
        assert not blocks
        return
    assert blocks
    for name in ("README.md", "docs", "examples"):  # what a reader finds in a checkout
        (tmp_path / name).symlink_to(ROOT / name)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    packages = os.pathsep.join([str(ROOT), str(ROOT / "integrations")])
    given = {"PATH": path, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(blocks),
        cwd=tmp_path,
        env=os.environ | given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-5000:]
