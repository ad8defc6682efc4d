"""Two ranks give the answers of the model."""

import multiprocessing

import pytest

from mor_layers import save_model
from tests.mor_layers.small_models import small_model
from tests.mor_vllm.real.engines import ROUGH, compare, engine, greedy, mixed_prompts
from tests.mor_vllm.real.models import SERVED

NAMES = ("make pretrain", "experts, expert choice, exit state", "expert choice, sharing")


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are forks of this process, which has imported vLLM; spawned ones would, each, for long."""
    from vllm.v1.executor import multiproc_executor

    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiproc_executor, "get_mp_context", lambda: context)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_give_the_answers_of_the_model(tmp_path, name):
    model = small_model(SERVED[name]).eval()
    save_model(model, tmp_path / "model")
    with engine(tmp_path / "model", tensor_parallel_size=2, **ROUGH) as llm:
        answers = greedy(llm, mixed_prompts(64, 257))
    result = compare(model, answers)
    print(f"{name}, two ranks: {result}")
    assert result.other_choices == 0 and result.largest < 1e-5
    assert len(result.depths) > 1
