"""Two ranks give the answers of the model."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch._dynamo

from mor_layers import save_model
from tests.mor_vllm.real.engines import ROUGH, Compared, compare, engine, greedy, mixed_prompts
from tests.mor_vllm.real.models import served_model

NAMES = ("make pretrain", "experts, expert choice, exit state", "expert choice, sharing")


@pytest.fixture(scope="module")
def fresh() -> Iterator[ProcessPoolExecutor]:
    """A process in which no engine has run: forks of one in which some have do not come to an end."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield process


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_give_the_answers_of_the_model(tmp_path, fresh, name):
    save_model(served_model(name), tmp_path / "model")
    result = fresh.submit(_run, name, tmp_path / "model").result()
    print(f"{name}, two ranks: {result}")
    assert result.other_choices == 0 and result.largest < 1e-5
    assert len(result.depths) > 1


def _run(name: str, folder: Path) -> Compared:
    from vllm.v1.executor import multiproc_executor

    # The ranks are forks of this process, which imports vLLM once; spawned ones would, each.
    context = multiprocessing.get_context("fork")
    multiproc_executor.get_mp_context = lambda: context
    torch._dynamo.config.disable = True
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    with engine(folder, tensor_parallel_size=2, **ROUGH) as llm:
        answers = greedy(llm, mixed_prompts(64, 257))
    return compare(served_model(name), answers)
