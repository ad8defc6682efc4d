"""Every Python block of the README and of the pages runs as printed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").glob("*.md"))]

# One process for all pages: importing Megatron takes seconds. A page's blocks share names.
RUNNER = """
import json, os, sys, tempfile, traceback, warnings

os.environ["HF_HUB_OFFLINE"] = "1"
import torch

warnings.simplefilter("ignore")
torch.set_num_threads(1)
for name, blocks in json.load(sys.stdin).items():
    torch.manual_seed(0)
    names, outcome = {"__name__": name}, None
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for line, code in blocks:
                exec(compile("\\n" * line + code, name, "exec"), names)
        except BaseException:
            outcome = traceback.format_exc()
        os.chdir("/")
    if torch.distributed.is_initialized():
        if "megatron.core.parallel_state" in sys.modules:
            sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
        torch.distributed.destroy_process_group()
    print("outcome", json.dumps([name, outcome]), flush=True)
"""


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """Line before each Python block, and its code."""
    blocks, code, indent = [], None, ""
    for number, line in enumerate(page.read_text("utf-8").splitlines(), start=1):
        if code is None and line.strip() == "```python":
            code, indent = [], line[: line.index("`")]
            start = number
        elif code is not None and line.strip() == "```":
            blocks.append((start, "\n".join(code)))
            code = None
        elif code is not None:
            code.append(line.removeprefix(indent))
    return blocks


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """For each page None, or what went wrong."""
    found = {page.name: blocks_of(page) for page in PAGES}
    run = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps({name: blocks for name, blocks in found.items() if blocks}),
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("outcome ")]
    told = dict(json.loads(line.removeprefix("outcome ")) for line in lines)
    for name, blocks in found.items():
        told.setdefault(name, f"{name} did not come to its end:\n{run.stderr}" if blocks else None)
    return told


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_code_runs_as_printed(outcomes: dict[str, str | None], page: str) -> None:
    assert outcomes[page] is None, outcomes[page]
