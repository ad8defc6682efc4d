"""A checkpoint that is written while training goes on is what was there when it began."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.full
def test_training_goes_on_while_a_checkpoint_is_written_and_resumes_from_it(tmp_path: Path) -> None:
    program = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.distributed.checkpoints.background_saving",
    ]
    done = subprocess.run(
        [*program, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
