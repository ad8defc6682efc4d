"""Figures that Megatron's training loop is handed are those of `routing_reports`.

The loop itself, its log line and TensorBoard are run by `make test-megatron-lm`.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from mor_megatron import RoutingReport, routing_reports
from mor_megatron.models.megatron_lm import recursion_builder, recursion_spec
from tests.distributed import megatron_setup as setup
from tests.distributed.models.test_megatron_lm import gpt
from tests.distributed.pool import WorkerPool
from tests.distributed.training.test_router_updates import MOE, SEQUENCE_LENGTH, WARMUP


class Writer:
    """TensorBoard."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value: float, iteration: int) -> None:
        self.scalars[name] = value


@dataclass(frozen=True)
class Logged:
    """What one rank logged of one batch."""

    losses: dict[str, float]
    """That the loop was handed."""
    written: dict[str, float]
    report: RoutingReport
    """Of `routing_reports`."""


def log(layout: dict[str, Any], config: dict[str, Any], build: str) -> Logged:
    from megatron.training import global_vars, training

    setup.initialize(**layout)
    given: dict[str, Tensor] = {}
    writer = Writer()

    def training_log(
        loss_dict: dict[str, Tensor], total_loss_dict: Any, learning_rate: Any, iteration: int
    ) -> None:
        given.update(loss_dict)

    originals = training.training_log, global_vars._GLOBAL_TENSORBOARD_WRITER
    training.training_log, global_vars._GLOBAL_TENSORBOARD_WRITER = training_log, writer
    global_vars.set_args(SimpleNamespace(tensorboard_log_interval=1))
    try:
        made = setup.tiny_config(num_layers=8, **config)
        makers = {
            "builder": lambda: recursion_builder(WARMUP)(made),
            "spec": lambda: recursion_spec(WARMUP),
        }
        model = gpt(made, makers[build]())
        setup.fill_parameters([model])
        chunks = setup.data_parallel([model])
        for seed in range(2):  # in the second, capacities have gone down
            setup.forward_backward(chunks, setup.random_tokens(4, SEQUENCE_LENGTH, seed=seed))
        is_last = parallel_state.is_pipeline_last_stage()
        losses = {"lm loss": torch.tensor(1.5)} if is_last else {}
        training.training_log(losses, {}, None, iteration=2)
    finally:
        global_vars.unset_global_variables()
        training.training_log, global_vars._GLOBAL_TENSORBOARD_WRITER = originals
    (report,) = routing_reports(chunks)
    return Logged({name: value.item() for name, value in given.items()}, writer.scalars, report)


CASES: dict[str, dict[str, Any]] = {
    "one rank, experts": {"layout": {}, "config": MOE, "build": "builder"},
    "PP2, experts": {"layout": {"pp": 2}, "config": MOE, "build": "builder"},
    "DP2": {"layout": {}, "config": {}, "build": "spec"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_loop_is_handed_the_figures_of_reports(pool: WorkerPool, case: str) -> None:
    num_ranks = 1 if case.startswith("one") else 2
    ranks = pool.run(log, num_ranks, **CASES[case])
    last = ranks[-1]
    assert last.losses.pop("lm loss") == 1.5
    assert last.losses == pytest.approx(in_the_line(last.report), abs=1e-6)
    assert last.report.shares[2] < 1
    if last.report.expert_load is not None:
        load = last.report.expert_load / last.report.expert_load.sum(dim=-1, keepdim=True)
        assert last.written["recursion/step_3/layer_2/expert_1_load"] == pytest.approx(
            load[2, 1, 1].item()
        )
    assert last.written["recursion/step_2/sampling_loss"] == pytest.approx(
        last.report.metrics["step_2/sampling_loss"]
    )
    if case.startswith("PP2"):
        assert ranks[0].losses == {}  # a stage without losses prints none


def in_the_line(report: RoutingReport) -> dict[str, float]:
    """What the log line should say."""
    figures = {f"recursion step {n} share": share for n, share in enumerate(report.shares, 1)}
    figures["recursion dead positions"] = report.dead_positions
    for name in ("sampling_accuracy", "sampling_loss"):
        of_steps = [report.metrics[f"step_{step}/{name}"] for step in (1, 2, 3)]
        figures[f"recursion {name}"] = sum(of_steps) / 3
    if report.expert_load is not None:
        load = report.expert_load
        busiest = load.amax(dim=-1) / load.mean(dim=-1)
        figures["recursion expert imbalance"] = busiest.mean().item()
    return figures
