"""A run starts from given weights, in our format or Megatron's, in every layout."""

from pathlib import Path

import pytest

from mor_tools.commands import main
from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import (
    assert_same_curves,
    history,
    pretrain_on_rank,
    write_text,
)

TWO_RANKS = ["parallel.tensor=2", "parallel.sequence_parallel=true"]
QWEN = ["model.head_dim=12", "model.qkv_bias=true", "model.qk_norm=true"]
QWEN += [
    "model.rope_scaling={rope_type: yarn, factor: 4, original_max_position_embeddings: 8}",
]


@pytest.mark.full
def test_runs_start_from_our_format_and_from_megatrons(pool: WorkerPool, tmp_path: Path) -> None:
    first = tmp_path / "first"
    common = [*write_text(tmp_path), *QWEN, "model.rms_norm_epsilon=1e-6"]
    common += ["training.steps=2", "training.decay_steps=1"]

    def pretrain(output: str, weights: Path, *settings: str, ranks: int = 1) -> Path:
        given = [*common, f"output={tmp_path / output}", f"training.initial_weights={weights}"]
        given.append("evaluation.sample_tokens=0")
        pool.run(pretrain_on_rank, ranks, settings=[*given, *settings])
        return tmp_path / output

    pool.run(pretrain_on_rank, settings=[*common, f"output={first}"])
    main(["convert", str(first / "model"), str(tmp_path / "weights"), "--to", "megatron"])
    ours = pretrain("from_ours", first / "model")
    # A checkpoint of a run, and one that was converted.
    theirs = pretrain("from_run", first, *TWO_RANKS, ranks=2)
    assert_same_curves(ours, theirs)
    assert_same_curves(ours, pretrain("from_megatron", tmp_path / "weights"))
    before, after = history(first), history(ours)
    assert after[0]["loss"] < before[0]["loss"] - 0.1
    with pytest.raises(AssertionError, match=r"qk_norm is True there, False here"):
        pretrain("other", first / "model", "model.qk_norm=false")
    assert not list((tmp_path / "other").glob("checkpoints"))
