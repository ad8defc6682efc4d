"""Everything in `examples` that can be run explains itself, and one that needs torchrun says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(
    path for path in EXAMPLES.rglob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")
)
LAUNCHERS = sorted(EXAMPLES.rglob("*.sh"))
NEED_TORCHRUN = {"fsdp2.py", "pretrain_gpt_mor.py"}

# What takes seconds to import is imported once. Each script runs in a fork of its own, so that none sees
# what another one has registered.
RUNNER = """
import contextlib, io, json, multiprocessing, runpy, sys, warnings

sys.path.insert(0, sys.argv.pop(1))  # for what examples import of one another
warnings.simplefilter("ignore")
import mor_tools.pretraining.session, torch, transformers


def run(command):
    sys.argv = command
    with (
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(output),
    ):
        try:
            runpy.run_path(command[0], run_name="__main__")
            code = None
        except SystemExit as ended:
            code = ended.code
    return code, output.getvalue()


with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    print(json.dumps(pool.map(run, json.load(sys.stdin), chunksize=1)))
"""
HELP = [[str(script), "--help"] for script in SCRIPTS]
BARE = [[str(script)] for script in SCRIPTS if script.name in NEED_TORCHRUN]


@pytest.fixture(scope="module")
def told() -> dict[tuple[str, ...], tuple[int | None, str]]:
    """Exit code and output of each command."""
    environment = {name: v for name, v in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    commands = [*HELP, *BARE]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(EXAMPLES)],
        input=json.dumps(commands),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    return {tuple(command): tuple(one) for command, one in zip(commands, outcomes, strict=True)}


@pytest.mark.full
def test_every_script_has_help(told):
    assert len(HELP) >= 12
    for command in HELP:
        code, output = told[tuple(command)]
        assert code == 0, (command, output)
        assert "usage: " in output or "torchrun --nproc-per-node" in output, command


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.name)
def test_every_launcher_has_help(launcher):
    done = subprocess.run([launcher, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"examples/launch/{launcher.name} \\" in done.stdout


@pytest.mark.full
def test_scripts_that_need_torchrun_say_so_in_one_line(told):
    assert len(BARE) == len(NEED_TORCHRUN)
    for command in BARE:
        code, output = told[tuple(command)]
        assert code == 2, (command, output)
        assert output.count("\n") == 1, output
        assert "torchrun --nproc-per-node" in output
