"""Megatron-LM's pretrain_gpt.py, with no line changed, trains as a hand-written loop does.

All layouts go through gradient accumulation, evaluation and the updates of routers, which nobody calls.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from mor_megatron import RoutingReport
from mor_megatron.models.hybrid_pattern import HybridPattern
from tests.distributed.pool import WorkerPool
from tests.megatron_lm import by_hand, specs
from tests.megatron_lm.by_hand import Trained
from tests.megatron_lm.runs import ABSENT, MOE, Run, run, train

FULL = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
SAVED_AT = 3
SAVING = {"save-interval": SAVED_AT}


def resume(folder: Path) -> dict[str, Any]:
    """Arguments that go on from the first of a run's checkpoints."""
    return {"load": folder, "ckpt-step": SAVED_AT}


def equal(values: list[float]) -> Any:
    return pytest.approx(values, abs=1e-5)


@pytest.fixture(scope="module")
def expected(pool: WorkerPool) -> Trained:
    """The dense model with capacities that warm up."""
    return pool.run(by_hand.train, recursion=specs.WARMUP, fields={})[0]


@pytest.fixture(scope="module")
def one_rank(script: Path, folder: Path) -> Run:
    """One rank recomputes everything, calls `update_routers` as well, and saves half-way."""
    return train(script, "warmup_and_a_call", **FULL, **SAVING, save=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the checkpoints of one rank."""
    return tmp_path_factory.mktemp("one_rank")


def test_losses_depend_on_the_updates(pool: WorkerPool, expected: Trained) -> None:
    """Otherwise equal losses would not show that they took place."""
    recursion: dict[str, Any] = {"recursion": specs.WARMUP, "fields": {}}
    (without,) = pool.run(by_hand.train, **recursion, updates=False)
    assert without.losses[0] == expected.losses[0]
    assert without.losses[1:] != equal(expected.losses[1:])


def test_one_rank_with_recomputation_and_a_call_too_many(one_rank: Run, expected: Trained) -> None:
    assert one_rank.losses == equal(expected.losses)


def test_two_replicas_with_the_distributed_optimizer(script: Path, expected: Trained) -> None:
    done = train(
        script,
        "warmup",
        num_ranks=2,
        use_distributed_optimizer=None,
        overlap_grad_reduce=None,
        overlap_param_gather=None,
    )
    assert done.losses == equal(expected.losses)
    for step, shares in enumerate(zip(*(r.shares for r in expected.reports), strict=True), 1):
        assert done.logged(f"recursion step {step} share") == equal(list(shares))


@pytest.mark.parametrize(
    ("num_ranks", "arguments"),
    [(1, {}), (2, {"tensor_model_parallel_size": 2, "sequence_parallel": None})],
    ids=["one rank", "TP and SP"],
)
def test_documents_are_kept_apart_by_packing(
    script: Path, pool: WorkerPool, tmp_path: Path, num_ranks: int, arguments: dict[str, Any]
) -> None:
    """The script joins the samples of a micro-batch to one packed row."""
    documents = tmp_path / "documents"
    by_hand.write_documents(documents)
    recursion: dict[str, Any] = {"recursion": specs.WARMUP, "fields": {}}
    (expected,) = pool.run(by_hand.train, **recursion, documents=documents)
    data = {"mock_data": ABSENT, "data_path": documents, "split": "969,30,1"}
    done = train(
        script, "warmup", num_ranks, dataloader_inter_document_masking=None, **data, **arguments
    )
    assert done.losses == equal(expected.losses)


@pytest.mark.usefixtures("one_rank")
def test_two_stages_go_on_from_one_rank(script: Path, folder: Path, expected: Trained) -> None:
    resumed = train(script, "warmup", num_ranks=2, pipeline_model_parallel_size=2, **resume(folder))
    assert resumed.losses == equal(expected.losses[SAVED_AT:])


def test_the_layout_that_an_error_proposes_trains_saves_and_resumes(
    script: Path, tmp_path: Path
) -> None:
    stages: dict[str, Any] = {"num_ranks": 2, "pipeline-model-parallel-size": 2}
    refused = run(script, "loss_free", **stages)
    assert refused.code != 0
    proposed = re.search(r"for example '(\S+)'\.", refused.output)
    assert proposed is not None, refused.output[-4000:]
    stages["pipeline-model-parallel-layout"] = proposed[1]
    whole = train(script, "loss_free", **stages, **SAVING, save=tmp_path)
    resumed = train(script, "loss_free", **stages, **resume(tmp_path))
    assert resumed.losses == whole.losses[SAVED_AT:]
    assert len(set(whole.logged("recursion step 3 share"))) > 1  # the bias moved the depths


def test_two_tensor_parallel_ranks_with_experts(script: Path, pool: WorkerPool) -> None:
    spread = {"tensor-model-parallel-size": 2, "sequence-parallel": None}
    done = train(script, "warmup", num_ranks=2, **MOE, **spread)
    (expected,) = pool.run(by_hand.train, recursion=specs.WARMUP, fields=by_hand.MOE)
    assert done.losses == equal(expected.losses)
    for number, report in enumerate(expected.reports):
        for name, figure in _figures(report).items():
            assert done.written[name][number] == pytest.approx(figure, abs=1e-5), name


def _figures(report: RoutingReport) -> dict[str, float]:
    """What TensorBoard should say of a batch."""
    figures = {f"recursion step {n} share": share for n, share in enumerate(report.shares, 1)}
    figures["recursion dead positions"] = report.dead_positions
    figures |= {f"recursion/{name}": value for name, value in report.metrics.items()}
    assert report.expert_load is not None
    load = report.expert_load / report.expert_load.sum(dim=-1, keepdim=True)
    busiest = load.max(dim=-1).values * load.shape[-1]
    figures["recursion expert imbalance"] = busiest.mean().item()
    for step, layers in enumerate(load, 1):
        for layer, experts in enumerate(layers, 1):
            for expert, share in enumerate(experts):
                name = f"recursion/step_{step}/layer_{layer}/expert_{expert}_load"
                figures[name] = share.item()
    return figures


def test_the_hybrid_script_trains_the_same_recursion(scripts: Path, pool: WorkerPool) -> None:
    unrolled = HybridPattern.parse(specs.PATTERN).unrolled
    (expected,) = pool.run(by_hand.train, recursion=specs.WARMUP, fields={}, is_hybrid=True)
    done = train(
        scripts / "pretrain_hybrid.py",
        "hybrid",
        num_ranks=2,
        **{"tensor-model-parallel-size": 2, "sequence-parallel": None},
        num_layers=ABSENT,
        hybrid_layer_pattern=unrolled,
    )
    assert done.losses == equal(expected.losses)
    for step, shares in enumerate(zip(*(r.shares for r in expected.reports), strict=True), 1):
        assert done.logged(f"recursion step {step} share") == equal(list(shares))
