"""Our torchrun: what a run says at its end is the last thing on the terminal, once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mor_tools.commands import main
from tests.mor_tools.pretraining.processes.test_launcher import wait_until
from tests.mor_tools.pretraining.processes.test_several_nodes import steps_noted
from tests.mor_tools.pretraining.runs import SMALL, TINY, write_text
from tests.mor_tools.terminals import ENVIRONMENT, on_a_terminal

TORCHRUN = [sys.executable, "-m", "mor_tools.pretraining.torchrun", "--standalone"]
MOR = [sys.executable, "-m", "mor_tools.commands"]


def script(folder: Path, last_line: str) -> str:
    """A script of processes that end with `last_line`."""
    path = folder / "script.py"
    lines = ["import os", "from mor_tools.pretraining import endings", last_line]
    path.write_text("\n".join(lines))
    return str(path)


def test_a_refusal_by_all_ranks_is_one_colored_line(tmp_path):
    refusal = (
        "endings.tell('steps=0 must be at least 1.', os.environ['LOCAL_RANK'] == '0'); exit(2)"
    )
    status, shown = on_a_terminal([*TORCHRUN, "--nproc-per-node", "2", script(tmp_path, refusal)])
    assert status == 2
    assert shown == "\x1b[1;31merror:\x1b[0m steps=0 must be at least 1.\n"


@pytest.mark.full
def test_a_fault_of_the_program_keeps_its_traceback_and_the_report_of_torchrun(tmp_path):
    command = [*TORCHRUN, "--nproc-per-node", "1", script(tmp_path, "1 / 0")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert "exitcode  : 1" in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", TINY, "training.steps=-3"], "training.steps=-3 must be at least 1."),
        (["--processes", "3", "--config", TINY], "3 processes cannot hold copies of "),
        (["--processes", "0"], "--processes 0 must be at least 1."),
    ],
)
def test_wrong_settings_are_refused_before_a_process_starts(
    arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr("torch.distributed.run.run", lambda options: pytest.fail("was started"))
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_says_where_it_is_saved_and_how_to_resume(tmp_path, name, processes):
    run, log = tmp_path / "run", tmp_path / "log"
    settings = [*write_text(tmp_path), f"output={run}", "training.steps=100000"]
    settings += ["evaluation.every=100000", "log_every=100000", "training.checkpoint_every=100000"]
    command = [*MOR, "pretrain", "--processes", str(processes), "--config", TINY, *SMALL, *settings]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True
        )
    try:
        wait_until(lambda: steps_noted(run) >= 2 or process.poll() is not None)
        if name == "SIGINT":  # a terminal sends it to all processes
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + getattr(signal, name)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    printed = log.read_text()
    steps = steps_noted(run)
    folder = run / "checkpoints" / f"step_{steps:08d}"
    assert folder.is_dir()
    *_, told, resume = printed.splitlines()
    assert told == f"stopped after step {steps} of 100000, saved in {folder}. Resume with:"
    assert f"mor_tools.commands pretrain --processes {processes} --config {TINY}" in resume
    assert printed.count("stopped after step") == 1
    assert "Traceback" not in printed
