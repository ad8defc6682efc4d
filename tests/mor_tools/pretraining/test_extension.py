"""A run becomes longer than it was planned, and a new run starts from the weights of another."""

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import continued, history, pretrain_on_rank, write_text

PLAN = ["training.steps=4", "training.decay_steps=2", "evaluation.sample_tokens=0"]
LONGER = ["training.steps=7", "training.decay_steps=2", "evaluation.sample_tokens=0"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> list[str]:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(pool: WorkerPool, text, tmp_path_factory) -> Path:
    """A complete run of four steps, whose learning rate decays in the last two."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    pool.run(pretrain_on_rank, settings=[*text, *PLAN, f"output={folder}"])
    return folder


@pytest.fixture(scope="module")
def planned_longer(pool: WorkerPool, text, tmp_path_factory) -> Path:
    """A run of seven steps from the start."""
    folder = tmp_path_factory.mktemp("runs") / "longer"
    pool.run(pretrain_on_rank, settings=[*text, *LONGER, f"output={folder}"])
    return folder


def checkpoints(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder / "checkpoints")) for p in folder.rglob("step_*"))


def test_an_extended_run_equals_one_that_was_planned_longer(
    pool: WorkerPool, text, finished, planned_longer, tmp_path
):
    folder = tmp_path / "extended"
    settings = [*text, *LONGER, continued(finished, folder)]
    (printed,) = pool.run(pretrain_on_rank, settings=settings)
    assert "extended from 4 to 7 steps: it resumes from step 2, the last checkpoint" in printed
    assert history(folder) == history(planned_longer)
    assert checkpoints(folder) == [
        "of_4_steps/step_00000004",
        "step_00000002",
        "step_00000005",
        "step_00000007",
    ]
    claim = json.loads((folder / "run.json").read_text())
    assert claim["settings"]["training"]["steps"] == 7
    (extension,) = claim["extensions"]
    assert (extension["steps"], extension["from_step"]) == ([4, 7], 2)
    (printed,) = pool.run(pretrain_on_rank, settings=settings)
    assert "is complete: all 7 steps are done" in printed and "extended from" not in printed


def test_a_run_whose_decay_has_not_begun_just_goes_on(
    pool: WorkerPool, text, planned_longer, tmp_path
):
    output = f"output={tmp_path / 'run'}"
    pool.run(pretrain_on_rank, settings=[*text, *PLAN, output, "training.stop_after=1"])
    (printed,) = pool.run(pretrain_on_rank, settings=[*text, *LONGER, output])
    assert "the learning rate has not begun to decay, so it resumes from step 1" in printed
    assert history(tmp_path / "run") == history(planned_longer)


def test_without_a_checkpoint_from_before_the_decay_the_rate_is_raised_again(
    pool: WorkerPool, text, finished, planned_longer, tmp_path
):
    folder = tmp_path / "run"
    output = continued(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000002")
    (printed,) = pool.run(pretrain_on_rank, settings=[*text, *LONGER, output])
    assert "no checkpoint from before the decay is left, so it resumes from step 4" in printed
    rates = [row["learning_rate"] for row in history(folder)]
    planned = [row["learning_rate"] for row in history(planned_longer)]
    assert rates[2] < planned[2]  # the earlier decay
    assert rates[4:] == planned[4:]


def test_an_extension_whose_decay_began_already_is_refused(
    pool: WorkerPool, text, finished, tmp_path
):
    output = continued(finished, tmp_path / "run")
    settings = [*text, *PLAN, output, "training.steps=5", "training.decay_steps=4"]
    with pytest.raises(AssertionError, match="Use at most decay_steps=3, or more steps"):
        pool.run(pretrain_on_rank, settings=settings)
    for change in ("training.steps=3", "training.decay_steps=1"):  # these change what it was
        with pytest.raises(AssertionError, match="holds a run with other settings"):
            pool.run(pretrain_on_rank, settings=[*text, *PLAN, output, change])


def test_more_epochs_than_planned_are_said(pool: WorkerPool, text, finished, tmp_path):
    settings = [*text, *LONGER, continued(finished, tmp_path / "run"), "training.steps=50"]
    (printed,) = pool.run(pretrain_on_rank, settings=[*settings, "training.stop_after=2"])
    assert "50 steps read the text" in printed and "which changes its order" in printed


def test_a_branch_starts_from_the_weights_of_a_run_and_keeps_its_tokenizer(
    pool: WorkerPool, text, finished, tmp_path
):
    settings = [*PLAN, f"output={tmp_path / 'branch'}", f"training.initial_weights={finished}"]
    settings += ["training.learning_rate=1e-3", "training.stop_after=1"]
    (printed,) = pool.run(pretrain_on_rank, settings=[*text, *settings])
    assert f"a branch of {finished}: its weights after step 4, with a new optimizer" in printed
    first, *_ = history(tmp_path / "branch")
    assert first["loss"] < history(finished)[0]["loss"]
    (printed,) = pool.run(pretrain_on_rank, settings=[*text, *settings])
    assert "a branch of" not in printed  # it is a run of its own now

    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"number {i} " * 9}) for i in range(90)))
    settings = [f"data.path={other}", f"data.prepared_folder={tmp_path}", *settings]
    with pytest.raises(AssertionError, match=r"is a run with another tokenizer.*Add data\.tok"):
        pool.run(pretrain_on_rank, settings=[*settings, f"output={tmp_path / 'refused'}"])
