"""The pretraining script reads through DALI what it reads through Megatron's loader."""

import pytest

from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import history, pretrain_on_rank, write_text


@pytest.mark.full
@pytest.mark.parametrize("is_packed", ["true", "false"])
def test_losses_are_those_of_the_megatron_loader_through_a_stop(
    pool: WorkerPool, tmp_path, is_packed
):
    common = [*write_text(tmp_path), f"data.reset_attention_mask={is_packed}"]

    def pretrain(name: str, *settings: str) -> str:
        settings = (f"output={tmp_path / name}", *settings)
        return pool.run(pretrain_on_rank, 2, settings=[*common, *settings])[0]

    pretrain("megatron")
    pretrain("dali", "data.loader=dali", "training.stop_after=2")
    assert "resumed at step 2 of 4" in pretrain("dali", "data.loader=dali")
    assert len(history(tmp_path / "dali")) == 4
    assert history(tmp_path / "dali") == history(tmp_path / "megatron")
