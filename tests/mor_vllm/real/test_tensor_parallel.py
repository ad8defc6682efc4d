"""Two ranks give the answers of the model, with parts of every layer or with whole experts."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo

from mor_layers import save_model
from tests.mor_vllm.models import served_model
from tests.mor_vllm.real.engines import ROUGH, Compared, compare, engine, greedy, mixed_prompts

NAMES = (
    "make pretrain",
    "experts, expert choice, exit state",
    "expert choice, sharing",
    "deltas, biases, expert choice, update",
    "own attention, experts, expert choice, update",
    "streams, expert choice",
)


@pytest.fixture(scope="module")
def fresh() -> Iterator[ProcessPoolExecutor]:
    """A process in which no engine has run: forks of one in which some have do not come to an end."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield process


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_give_the_answers_of_the_model(tmp_path, fresh, name):
    save_model(served_model(name), tmp_path / "model")
    _check(f"{name}, two ranks", fresh.submit(_run, name, tmp_path / "model").result())


def test_expert_parallelism_gives_the_answers_of_the_model(tmp_path, fresh):
    save_model(served_model("make pretrain"), tmp_path / "model")
    run = fresh.submit(_run, "make pretrain", tmp_path / "model", enable_expert_parallel=True)
    _check("make pretrain, two ranks, whole experts", run.result())


def _check(name: str, result: Compared) -> None:
    print(f"{name}: {result}")
    assert result.other_choices == 0 and result.largest < 1e-5
    assert len(result.depths) > 1


def _run(name: str, folder: Path, **settings: Any) -> Compared:
    from vllm.v1.executor import multiproc_executor

    # The ranks are forks of this process, which imports vLLM once; spawned ones would, each.
    context = multiprocessing.get_context("fork")
    multiproc_executor.get_mp_context = lambda: context
    torch._dynamo.config.disable = True
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    with engine(folder, tensor_parallel_size=2, **settings, **ROUGH) as llm:
        answers = greedy(llm, mixed_prompts(64, 257))
    return compare(served_model(name), answers)
