"""Answers of vLLM itself are those of the model, whatever else is in flight."""

import pytest

from mor_layers import save_model
from tests.mor_vllm.models import SERVED, is_routed, served_model
from tests.mor_vllm.real.engines import ROUGH, compare, counted, engine, greedy, mixed_prompts


@pytest.mark.parametrize("name", SERVED)
def test_64_requests_in_flight_get_the_answers_of_the_model(tmp_path, name):
    model = served_model(name)
    save_model(model, tmp_path / "model")
    with engine(tmp_path / "model", **ROUGH) as llm:
        answers = greedy(llm, mixed_prompts(64, 257))
        preempted, reused = (counted(llm, n) for n in ("num_preemptions", "prefix_cache_hits"))
    result = compare(model, answers)
    print(f"{name}: {result}, {preempted} preemptions, {reused} rows reused")
    assert result.other_choices == 0 and result.largest < 1e-5
    assert preempted and reused
    assert (len(result.depths) > 1) == is_routed(name)  # else no token exits, and nothing was shown
