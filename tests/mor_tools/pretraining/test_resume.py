"""The pretraining script on two processes: stopping and resuming changes nothing."""

import json

from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import history, pretrain_on_rank, write_text


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(pool: WorkerPool, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [*write_text(tmp_path), "parallel.tensor=2", "parallel.sequence_parallel=true"]
    common += ["training.micro_batch_size=4"]

    def pretrain(*settings: str, draws: bool = False) -> str:
        return pool.run(pretrain_on_rank, 2, settings=[*common, *settings], draws=draws)[0]

    pretrain(f"output={whole}", draws=True)
    for name in ("summary.json", "checkpoints/latest", "tensorboard"):
        assert (whole / name).exists()
    assert (whole / "report.html").read_text().count("<svg") > 3

    assert "stopped after step 2 of 4" in pretrain(f"output={parts}", "training.stop_after=2")
    assert not (parts / "summary.json").exists()
    assert "resumed at step 2 of 4" in pretrain(f"output={parts}")

    assert [row["step"] for row in history(whole)] == [1, 2, 3, 4]
    assert history(parts) == history(whole)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, parts)]
    for name in ("validation_loss", "sample", "depth_shares", "parameters"):
        assert summaries[0][name] == summaries[1][name]

    assert "is complete: all 4 steps are done" in pretrain(f"output={parts}")
