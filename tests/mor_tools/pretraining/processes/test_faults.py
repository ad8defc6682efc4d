"""What can go wrong in a run: it ends with who and where, and the last good checkpoint counts."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.processes.test_several_nodes import (
    rank_of,
    started,
    steps_noted,
    wait_until,
)
from tests.mor_tools.pretraining.runs import continued, history, pretrain_on_rank, write_text

RUN = ["training.steps=6", "training.checkpoint_every=2", "evaluation.every=6", "log_every=1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> list[str]:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def begun(pool: WorkerPool, text, tmp_path_factory) -> Path:
    """A run of one process that stopped after step 4 of 6, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    stop = ["training.stop_after=4", f"output={folder}"]
    pool.run(pretrain_on_rank, settings=[*text, *RUN, *stop])
    return folder


def test_a_damaged_checkpoint_is_left_out_and_the_run_goes_on_from_the_one_before(
    pool: WorkerPool, text, begun, tmp_path
):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    pool.run(pretrain_on_rank, settings=[*text, *RUN, continued(begun, whole)])
    output = continued(begun, damaged)
    (shard,) = (damaged / "checkpoints" / "step_00000004").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-1])
    (printed,) = pool.run(pretrain_on_rank, settings=[*text, *RUN, output])
    assert re.search(
        r"step_00000004 is damaged: __0_0.distcp has .* bytes\. It is skipped", printed
    )
    assert "resumed at step 2 of 6" in printed
    assert history(damaged) == history(whole)
    (printed,) = pool.run(pretrain_on_rank, settings=[*text, *RUN, output])
    assert "is complete" in printed
    assert shard.stat().st_size == len(shard.read_bytes()) > 1  # written anew at step 4


def test_what_a_killed_session_left_and_what_a_folder_lacks_is_said(
    pool: WorkerPool, text, begun, tmp_path
):
    folder = tmp_path / "run"
    settings = [*text, *RUN, continued(begun, folder), "training.stop_after=5"]
    left = folder / "checkpoints" / ".step_00000006.partial"
    left.mkdir()
    (folder / "checkpoints" / "step_00000004" / "manifest.json").unlink()
    (folder / "checkpoints" / "latest").write_text("step_00000002")  # killed before it was written
    (folder / "checkpoints" / "step_00000002" / "manifest.json").unlink()
    rows = (folder / "history.jsonl").read_text().splitlines(keepends=True)
    (folder / "history.jsonl").write_text("".join(rows[:1]))
    (printed,) = pool.run(pretrain_on_rank, settings=settings)
    assert f"{left} was removed; a save that did not finish had left it behind." in printed
    assert not left.exists()
    assert "resumed at step 2 of 6" in printed  # that of step 4 is not known to be complete
    unsealed = folder / "checkpoints" / "step_00000002"
    assert f"warning: {unsealed} has no manifest.json with checksums" in printed
    assert "history.jsonl lacks 1 of the 2 steps taken so far, between steps 2 and 2" in printed
    assert not (folder / "run.lock").exists()


class SpoiledBackward(torch.autograd.Function):
    """The same number, with a gradient that is not one."""

    @staticmethod
    def forward(context, loss: Tensor) -> Tensor:  # type: ignore[override]
        return loss.clone()

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * torch.inf


def spoil_a_step(*, settings: list[str], what: str) -> str:
    """Goes on with a run whose rank 1 computes nonsense; the error that this ends with."""
    from mor_tools.pretraining import training

    forward, is_spoiled = training._forward_step, torch.distributed.get_rank() == 1

    def spoiled(data, model, teacher=None):
        output, mean_loss = forward(data, model, teacher)

        def loss_of(losses: Tensor) -> tuple[Tensor, Tensor]:
            part, reported = mean_loss(losses)
            if what == "loss":
                return part, reported * torch.nan
            return SpoiledBackward.apply(part), reported

        return output, loss_of if is_spoiled else mean_loss

    training._forward_step = spoiled
    try:
        pretrain_on_rank(settings=settings)
    except FloatingPointError as error:
        return str(error)
    finally:
        training._forward_step = forward
    return "it went on"


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("loss", r"step 5: the loss is nan, on rank 1 \(a micro-batch's loss\)\. Nothing"),
        pytest.param(
            "gradient",
            r"step 5: the gradient's norm is (inf|nan), on rank 0 \(.*weight.*\), rank 1",
            marks=pytest.mark.full,
        ),
    ],
)
def test_numbers_that_are_not_finite_end_the_run(
    pool: WorkerPool, text, begun, tmp_path, what, expected
):
    folder = tmp_path / "run"
    settings = [*text, *RUN, continued(begun, folder)]
    before = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    for message in pool.run(spoil_a_step, 2, settings=settings, what=what):
        assert re.search(expected, message), message
        assert f"last valid checkpoint is {folder}/checkpoints/step_00000004; run again" in message
    after = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    assert before == after
    assert len(history(folder)) == 4


def stop_at_a_step(*, settings: list[str]) -> str:
    """A run that is sent SIGTERM during its second step; what it printed."""
    from mor_tools.pretraining.training import Trainer

    train_step = Trainer.train_step

    def stopping(self, data):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, data)

    Trainer.train_step = stopping
    try:
        return pretrain_on_rank(settings=settings)
    finally:
        Trainer.train_step = train_step


def test_sigterm_ends_a_run_after_the_step_with_a_checkpoint(pool: WorkerPool, text, tmp_path):
    folder = tmp_path / "run"
    settings = [*text, *RUN, f"output={folder}", "training.checkpoint_every=6"]
    (printed,) = pool.run(stop_at_a_step, settings=settings)
    saved = folder / "checkpoints" / "step_00000002"
    assert f"stopped after step 2 of 6, saved in {saved}. Run the command again" in printed
    assert [p.name for p in (folder / "checkpoints").glob("step_*")] == ["step_00000002"]


@pytest.mark.full
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_the_run_ends_and_goes_on(
    pool: WorkerPool, text, begun, tmp_path, stopped
):
    folder = tmp_path / "run"
    settings = [*text, *RUN, continued(begun, folder), "training.timeout_seconds=15"]
    settings += ["training.steps=500", "training.checkpoint_every=2"]
    (folder / "run.json").unlink()  # it is longer than the run that was begun
    with started("nodes.sh", settings, PROCESSES=2, MAX_RESTARTS=0) as node:
        wait_until(lambda: steps_noted(folder) >= 8, [node])
        hung = rank_of([node], stopped)
        hung.suspend()
        wait_until_ended(node.process)
        assert node.process.returncode != 0
        assert f"rank {stopped} hangs" in node.printed
        # nodes.sh has rank 0 keep what the ranks tell each other.
        silent = ", or the torchrun .* has not" if stopped == 0 else " has not"
        assert re.search(
            rf"rank {stopped}{silent} responded since \d\d:\d\d:\d\d UTC", node.printed
        ), node.printed
        assert re.search(
            rf"rank {1 - stopped}: step \d+: .*, waiting for other ranks", node.printed
        )
    last = max(int(p.name[5:]) for p in (folder / "checkpoints").glob("step_*"))
    assert last >= 6
    printed, _ = pool.run(
        pretrain_on_rank, 2, settings=[*settings, f"training.stop_after={last + 1}"]
    )
    assert f"resumed at step {last} of 500" in printed


def wait_until_ended(process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None:
        assert time.monotonic() < deadline, "nothing ends"
        time.sleep(0.5)
