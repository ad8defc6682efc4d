"""The pretraining script on two real processes: stopping and resuming changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.moe.ffn_hidden_size=32",
    "recursion.router.warmup_steps=4",
    "data.vocabulary_size=300",
    "data.sequence_length=32",
    "data.held_out_share=0.2",
    "training.steps=6",
    "training.warmup_steps=2",
    "training.decay_steps=2",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "evaluation.every=3",
    "evaluation.batches=1",
    "evaluation.sample_tokens=4",
    "log_every=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Settings that name a small text."""
    folder = tmp_path_factory.mktemp("text")
    lines = (json.dumps({"text": f"document {i}: " + "red blue " * (i % 7 + 9)}) for i in range(60))
    (folder / "text.jsonl").write_text("\n".join(lines))
    return [f"data.path={folder}/text.jsonl", f"data.prepared_folder={folder}/prepared"]


def _pretrain(*settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "examples/pretrain_gpt_mor.py"]
    command += ["--config", "examples/configs/tiny.yaml", *SMALL, *settings]
    paths = f"{ROOT}{os.pathsep}{ROOT / 'integrations'}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def _history(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("tokens_per_second")  # the only thing that depends on the clock
    return rows


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ran = _pretrain(*data, f"output={whole}")
    assert ran.returncode == 0, ran.stderr
    for name in ("report.html", "summary.json", "checkpoints/latest", "tensorboard"):
        assert (whole / name).exists()

    stopped = _pretrain(*data, f"output={parts}", "training.stop_after=3")
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped after step 3 of 6" in stopped.stdout
    assert not (parts / "summary.json").exists()
    resumed = _pretrain(*data, f"output={parts}")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 3 of 6" in resumed.stdout

    assert [row["step"] for row in _history(whole)] == [1, 2, 3, 4, 5, 6]
    assert _history(parts) == _history(whole)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, parts)]
    for name in ("validation_loss", "sample", "depth_shares", "parameters"):
        assert summaries[0][name] == summaries[1][name]

    again = _pretrain(*data, f"output={parts}")
    assert again.returncode == 0
    assert "is complete: all 6 steps are done" in again.stdout
