"""Checkpoints that a run writes in the background: the same run, also if it is killed meanwhile."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mor_megatron.checkpoints import runs
from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import ROOT, history, pretrain_on_rank, write_text

RUN = ["training.steps=6", "training.checkpoint_every=2", "evaluation.every=6", "log_every=1"]


def run(folder: Path, killed_at: int, settings: list[str]) -> tuple[int, str]:
    """A run in `folder`/run that saves in the background: its exit code, and what it printed."""
    program = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.mor_tools.pretraining.run_folder.background_run",
    ]
    given = [*settings, f"output={folder}/run", "training.checkpoint_in_background=true"]
    log = folder / "log"
    with log.open("w") as file:  # not a pipe, whose end comes when the last writer has ended
        done = subprocess.run(
            [*program, str(folder), str(killed_at), *given],
            cwd=ROOT, stdout=file, stderr=file, timeout=300, check=False,
        )  # fmt: skip
    return done.returncode, log.read_text()


@pytest.mark.full
def test_a_run_killed_while_it_saves_resumes_from_the_checkpoint_before(
    pool: WorkerPool, tmp_path: Path
) -> None:
    settings = [*write_text(tmp_path), *RUN]
    pool.run(pretrain_on_rank, settings=[*settings, f"output={tmp_path}/whole"])
    code, printed = run(tmp_path, 4, settings)
    assert code == -9, printed
    checkpoints = tmp_path / "run" / "checkpoints"
    assert runs.steps(checkpoints) == [2]
    left = checkpoints / ".step_00000004.partial"
    assert left.is_dir()
    writers = [int(pid) for pid in (tmp_path / "children").read_text().split()]
    assert writers
    for _ in range(100):  # they must not write on while the next session does
        if not any(_runs(pid) for pid in writers):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"processes {writers} of a killed run are still there")

    code, printed = run(tmp_path, 0, settings)
    assert code == 0, printed
    assert f"{left} was removed" in printed
    assert "resumed at step 2 of 6" in printed
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    assert runs.steps(checkpoints) == runs.steps(tmp_path / "whole" / "checkpoints")
    # A run may change to the other way of saving, and has nothing left to do.
    (printed,) = pool.run(pretrain_on_rank, settings=[*settings, f"output={tmp_path}/run"])
    assert "is complete" in printed


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
