"""DeepSpeed's ZeRO on CPU processes: two ranks take the steps of one, at every stage."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PROGRAM = Path(__file__).with_name("train.py")


def trained(ranks: int, stage: int, folder: Path) -> dict[str, Any]:
    file = folder / f"{ranks}-{stage}.pt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(ranks), str(PROGRAM), str(stage), str(file)]
    given = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=given, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(file)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(1, 1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_take_the_steps_of_one(tmp_path: Path, alone: dict[str, Any], stage: int) -> None:
    together = trained(2, stage, tmp_path)
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    torch.testing.assert_close(together["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
