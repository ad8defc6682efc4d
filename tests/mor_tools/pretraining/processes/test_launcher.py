"""Processes whose torchrun is gone stop, with a checkpoint and a message; nobody trains out of sight."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from mor_tools.pretraining.launcher import LauncherLost, command
from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.processes.test_several_nodes import lives, steps_noted
from tests.mor_tools.pretraining.runs import ROOT, SMALL, TINY, pretrain_on_rank, write_text

CHILD = """
import os, sys, time
from mor_tools.pretraining.launcher import Launcher, LauncherLost, follow
parent = Launcher()
{follow}
try:
    print("ready", flush=True)
    for _ in range(3000):
        if {is_lost}:
            raise LauncherLost("It saw so by itself.")
        time.sleep(0.01)
except LauncherLost as error:
    open(sys.argv[1], "w").write(str(error))
"""
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
time.sleep(60)
"""


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("follow", "is_lost", "expected"),
    [
        pytest.param("follow()", "False", "before its first step", id="told by the kernel"),
        pytest.param("", "parent.is_gone", "It saw so by itself", id="compared"),
    ],
)
def test_a_process_notices_that_its_parent_was_killed(tmp_path, follow, is_lost, expected):
    if follow and sys.platform != "linux":
        pytest.skip("only Linux sends a signal when a parent ends")
    told = tmp_path / "told"
    child = CHILD.format(follow=follow, is_lost=is_lost)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations")])
    }
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, child, str(told)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    wait_until(lambda: told.exists() and told.read_text() != "", 20)
    assert expected in told.read_text()
    parent.stdout.close()


def lose_torchrun(*, settings: list[str]) -> str:
    """A run on two ranks, of which the second loses its parent in step 2; why it ends."""
    from mor_tools.pretraining.training import Trainer

    train_step, parent = Trainer.train_step, os.getppid

    def losing(self, data):
        if self.step == 1 and torch.distributed.get_rank() == 1:
            os.getppid = lambda: 1
        return train_step(self, data)

    Trainer.train_step = losing
    try:
        pretrain_on_rank(settings=settings)
    except LauncherLost as error:
        return str(error)
    finally:
        Trainer.train_step, os.getppid = train_step, parent
    return "the run was completed"


def test_a_run_stops_with_a_checkpoint_where_one_rank_has_lost_its_torchrun(
    pool: WorkerPool, tmp_path
):
    run = tmp_path / "run"
    settings = [*write_text(tmp_path), f"output={run}"]
    for reason in pool.run(lose_torchrun, 2, settings=settings):
        assert "torchrun, which started this run's processes, has ended" in reason
        assert f"stopped after step 2 of 4, saved in {run}/checkpoints/step_00000002." in reason
        assert "Run the command again" in reason
    assert names(run / "checkpoints") == ["latest", "step_00000002"]
    assert not (run / "run.lock").exists()


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_the_processes_of_a_killed_torchrun_stop_with_a_checkpoint(tmp_path, processes):
    run, log = tmp_path / "run", tmp_path / "log"
    settings = [*write_text(tmp_path), f"output={run}", "training.steps=100000"]
    settings += ["evaluation.every=100000", "log_every=100000", "training.checkpoint_every=100000"]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    start += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "--local-addr",
        "127.0.0.1",
    ]
    command = [
        *start,
        str(ROOT / "examples/pretrain_gpt_mor.py"),
        "--config",
        TINY,
        *SMALL,
        *settings,
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'integrations'}"}
    workers: list[psutil.Process] = []
    with log.open("w") as file:
        agent = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        wait_until(lambda: steps_noted(run) >= 2 or agent.poll() is not None)
        assert agent.poll() is None, log.read_text()
        workers += psutil.Process(agent.pid).children(recursive=True)
        assert len(workers) >= processes
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        wait_until(lambda: not any(map(lives, workers)), 60)
    finally:
        for process in [*workers, agent]:
            if isinstance(process, subprocess.Popen) or lives(process):
                process.kill()
    printed = log.read_text()
    steps = steps_noted(run)
    assert (
        "torchrun, which started this run's processes, has ended on one of the machines" in printed
    )
    saved = run / "checkpoints" / f"step_{steps:08d}"
    assert f"100000, saved in {saved}. Run the command again" in printed
    assert (run / "checkpoints" / "latest").read_text() == f"step_{steps:08d}"
    assert names(run / "checkpoints") == ["latest", f"step_{steps:08d}"]
    assert not (run / "run.lock").exists()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_command_that_starts_a_run_again(monkeypatch):
    monkeypatch.setattr(
        sys,
        "orig_argv",
        ["py", "-u", "-m", "mor_tools.pretraining", "--config", "a b.yaml", "training.steps=3"],
    )
    monkeypatch.setenv("PYTHONPATH", "/here")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    rest = "pretrain --processes 2 --config 'a b.yaml' training.steps=6"
    assert command("training.steps=6") == f"PYTHONPATH=/here py -m mor_tools.commands {rest}"
    assert command("training.steps=6", with_mor=True) == f"mor {rest}"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert command() is None
