"""The pretraining script trains a model with latent attention, in every layout alike."""

from pathlib import Path

import pytest

from mor_layers.models import LatentAttentionConfig
from mor_layers.weights import open_model
from mor_tools.commands import main
from mor_tools.pretraining.command_line import load_settings
from mor_tools.pretraining.models.workload import workload
from tests.mor_tools.pretraining.runs import (
    SMALL,
    TINY,
    assert_same_curves,
    continued,
    pretrain_on_rank,
    write_text,
)

LATENT = [
    "model.num_kv_heads=4",
    "model.latent_attention={kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 4, v_head_dim: 8}",
]


@pytest.mark.full
def test_a_run_goes_on_alike_with_tensor_parallelism(pool, tmp_path: Path) -> None:
    text = [*write_text(tmp_path), *LATENT]
    started, whole = tmp_path / "started", tmp_path / "whole"
    pool.run(pretrain_on_rank, settings=[*text, f"output={started}", "training.stop_after=1"])
    pool.run(pretrain_on_rank, settings=[*text, continued(started, whole)])
    split = ["parallel.tensor=2", "parallel.sequence_parallel=true"]
    output = continued(started, tmp_path / "split")
    pool.run(pretrain_on_rank, 2, settings=[*text, output, *split])
    assert_same_curves(tmp_path / "split", whole)
    # The model that the run wrote has the settings, and the weights of its checkpoint.
    main(["convert", str(whole), str(tmp_path / "model")])
    read = open_model(tmp_path / "model").config
    assert read.latent_attention == LatentAttentionConfig(16, 8, 4, 8)
    assert read == open_model(whole / "model").config


def test_a_plan_counts_latent_rows_that_every_rank_keeps() -> None:
    settings = load_settings(["--config", TINY, *SMALL, *LATENT, "recursion=null"])
    work = workload(settings, 257)
    # 32 tokens, 6 layers, 16 + 4 numbers of 4 bytes, or of 2.
    assert work.kv_bytes == 32 * 6 * 20 * work.itemsize
    assert work.split_caches(2) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("model.num_kv_heads=2", r"num_kv_heads=2 has no effect .* Set model.num_kv_heads=4"),
        ("model.head_dim=16", r"head_dim=16 has no effect .* Set model.head_dim=null"),
        ("model.qk_norm=true", r"qk_norm=True has no effect .* Set model.qk_norm=false"),
        ("model.latent_attention.qk_rope_head_dim=3", "qk_rope_head_dim=3 must be even"),
    ],
)
def test_settings_that_latent_attention_has_no_place_for(change: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_settings(["--config", TINY, *SMALL, *LATENT, change])
