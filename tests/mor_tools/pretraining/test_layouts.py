"""The pretraining script takes the same steps however the model is spread over processes."""

import json
from pathlib import Path

import pytest
import torch

from mor_layers.weights import open_model
from mor_tools.commands import main
from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import (
    assert_same_curves,
    continued,
    history,
    pretrain_on_rank,
    write_text,
)

STEPS_AS_STAGES = ["parallel.pipeline=2", "parallel.pipeline_layout=steps_as_stages"]
SEQUENCE = ["parallel.tensor=2", "parallel.sequence_parallel=true"]
LAYOUTS = {
    "PP=2, steps as stages": (2, STEPS_AS_STAGES),
    "PP=2, one stage": (2, ["parallel.pipeline=2"]),
    "PP=2 x DP=2, steps as stages, overlap": (
        4,
        [*STEPS_AS_STAGES, "parallel.overlap_grad_reduce=true"],
    ),
    "TP=2 x PP=2, steps as stages": (4, [*STEPS_AS_STAGES, *SEQUENCE]),
    "EP=2 x PP=2, steps as stages": (4, [*STEPS_AS_STAGES, "parallel.expert=2"]),
    "PP=2, steps as stages, recomputation": (2, [*STEPS_AS_STAGES, "training.recompute=full"]),
    "TP=2 x EP=2": (4, [*SEQUENCE, "parallel.expert=2"]),
    "CP=2": (2, ["parallel.context=2"]),
    "CP=2 x TP=2": (4, [*SEQUENCE, "parallel.context=2"]),
    "CP=2 x EP=2": (2, ["parallel.context=2", "parallel.expert=2"]),
    "CP=2 x PP=2": (4, ["parallel.context=2", "parallel.pipeline=2"]),
}
STABILITY = [
    "recursion.share_norms=false",
    "recursion.step_embeddings=true",
    "recursion.input_injection=true",
    "recursion.sandwich_norms=true",
    "recursion.loop_norm=true",
    "recursion.router.gate_bias=-1.0",
    "recursion.relaxation={rank: 2, projections: [query, output]}",
]
IN_SHORT = ("PP=2, steps as stages",)


@pytest.fixture(scope="module")
def on_one_process(pool: WorkerPool, tmp_path_factory) -> tuple[list[str], Path, Path]:
    """Settings of a text, a run that stopped after its first step, and one that went on."""
    folder = tmp_path_factory.mktemp("one_process")
    text = [*write_text(folder), *STABILITY]
    started, whole = folder / "started", folder / "whole"
    pool.run(pretrain_on_rank, settings=[*text, f"output={started}", "training.stop_after=1"])
    pool.run(pretrain_on_rank, settings=[*text, continued(started, whole)])
    return text, started, whole


@pytest.mark.parametrize(
    "name",
    [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS],
)
def test_a_run_goes_on_alike_in_every_layout(pool, on_one_process, tmp_path, name):
    text, started, whole = on_one_process
    world_size, layout = LAYOUTS[name]
    output = continued(started, tmp_path / "run")
    printed = pool.run(pretrain_on_rank, world_size, settings=[*text, output, *layout])[0]
    assert "resumed at step 1 of 4" in printed
    assert (tmp_path / "run" / "report.html").exists()
    assert_same_curves(tmp_path / "run", whole)
    # One process reads from the checkpoint what all of them put together at the end of the run.
    main(["convert", str(tmp_path / "run"), str(tmp_path / "model")])
    read, collected = open_model(tmp_path / "model"), open_model(tmp_path / "run" / "model")
    assert read.config == collected.config
    assert set(read.weights) == set(collected.weights)
    assert all(torch.equal(read.weights[n], collected.weights[n]) for n in read.weights)


def test_a_long_prelude_may_have_experts(pool, tmp_path):
    ends = ["recursion.prelude_layers=2", "recursion.coda_layers=0", "model.num_unrolled_layers=8"]
    settings = [*write_text(tmp_path), *ends, "model.moe.dense_ends=false", "training.stop_after=1"]
    pool.run(pretrain_on_rank, settings=[*settings, f"output={tmp_path / 'run'}"])
    main(["convert", str(tmp_path / "run"), str(tmp_path / "model")])
    read = open_model(tmp_path / "model")
    assert (read.config.schedule.prelude, read.config.schedule.coda) == (2, 0)
    assert "prelude.layers.1.mlp.router.weights.0" in read.weights


TWO = [
    "recursion=null",  # instead of that of the small run
    "recursion=[{num_recursions: 2, block_layers: 1, coda_layers: 0}, {num_recursions: 3, "
    "kv_policy: recursive_sharing, router: {type: expert_choice, warmup_steps: 2}}]",
    "model.num_unrolled_layers=8",
]
"""1 + 1 × 2 + 1 + 1 × 3 + 1 layers."""


def test_a_run_of_two_recursions_goes_on_alike_in_two_stages(pool, tmp_path):
    text, started, whole = [*write_text(tmp_path), *TWO], tmp_path / "started", tmp_path / "whole"
    pool.run(pretrain_on_rank, settings=[*text, f"output={started}", "training.stop_after=1"])
    output = continued(started, tmp_path / "run")
    pool.run(pretrain_on_rank, settings=[*text, continued(started, whole)])
    pool.run(pretrain_on_rank, 2, settings=[*text, output, "parallel.pipeline=2"])
    assert_same_curves(tmp_path / "run", whole)
    routing = history(whole)[-1]["routing"]
    assert routing["steps"] == [2, 3] and routing["shares"][:3] == [1.0, 1.0, 1.0]
    assert routing["shares"][3:] == pytest.approx([2 / 3, 1 / 3], abs=0.06)
    assert {"step_4/sampling_accuracy", "step_5/sampling_accuracy"} <= set(routing["metrics"])
    assert len(routing["expert_load"]) == 5
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["step_shares"] == pytest.approx(routing["shares"], abs=0.05)  # of other text
    assert summary["depth_shares"] is None
    page = (whole / "report.html").read_text()
    assert "held-out tokens in recursion 1" in page and "held-out tokens in recursion 2" in page
    saved = open_model(whole / "model")
    assert [part.schedule.num_recursions for part in saved.config.parts] == [2, 3]
    assert saved.config.dense_ends


@pytest.mark.full
@pytest.mark.parametrize("name", ["PP=2, steps as stages", "CP=2"])
def test_a_run_comes_back_to_one_process(pool, on_one_process, tmp_path, name):
    text, started, whole = on_one_process
    output = continued(started, tmp_path / "run")
    stop = "training.stop_after=3"
    world_size, layout = LAYOUTS[name]
    pool.run(pretrain_on_rank, world_size, settings=[*text, output, *layout, stop])
    printed = pool.run(pretrain_on_rank, settings=[*text, output])[0]
    assert "resumed at step 3 of 4" in printed
    assert_same_curves(tmp_path / "run", whole)
