"""Answers of vLLM itself are those of the model, whatever else is in flight."""

import pytest

from mor_layers import save_model
from tests.mor_layers.small_models import small_model
from tests.mor_vllm.real.engines import ROUGH, compare, counted, engine, greedy, mixed_prompts
from tests.mor_vllm.real.models import SERVED


@pytest.mark.parametrize("name", SERVED)
def test_64_requests_in_flight_get_the_answers_of_the_model(tmp_path, name, record_property):
    model = small_model(SERVED[name]).eval()
    save_model(model, tmp_path / "model")
    with engine(tmp_path / "model", **ROUGH) as llm:
        answers = greedy(llm, mixed_prompts(64, 257))
        preempted, reused = (counted(llm, n) for n in ("num_preemptions", "prefix_cache_hits"))
    result = compare(model, answers)
    print(f"{name}: {result}, {preempted} preemptions, {reused} rows reused")
    assert result.other_choices == 0 and result.largest < 1e-5
    assert preempted and reused
