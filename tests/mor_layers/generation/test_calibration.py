"""Shares that thresholds keep on held-out text, and the dial."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor_layers import (
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    RandomDepth,
    RecursionConfig,
    RouterConfig,
    TokenChoice,
)
from mor_layers.generation import Request, calibrate
from mor_layers.generation.depth.calibration import turned
from tests.mor_layers.generation.served import assert_exact, prompt, serve
from tests.mor_layers.small_models import plain_config, random_ids, small_config, small_model

TUNED: dict[str, RouterConfig] = {
    "expert_choice": ExpertChoice(alpha=0.7),
    "predictor": ExpertChoice(capacity_factors=(0.8, 0.5, 0.3), predictor="aux_router"),
    "token_choice": TokenChoice(),
    "depth_and_width": DepthAndWidth(),
    "random_depth": RandomDepth(),
}


@given(
    st.lists(st.floats(0.05, 1.0), min_size=1, max_size=5).map(
        lambda shares: tuple(sorted(shares, reverse=True))
    ),
    st.floats(0.05, 3.0),
)
def test_a_turned_dial_spends_what_it_says(shares: tuple[float, ...], dial: float) -> None:
    if dial * sum(shares) > len(shares):
        with pytest.raises(ValueError, match="every token runs all"):
            turned(shares, dial)
        return
    result = turned(shares, dial)
    assert sum(result) == pytest.approx(dial * sum(shares), rel=1e-6)
    assert list(result) == sorted(result, reverse=True)
    assert all(0 <= share <= 1 for share in result)


@pytest.mark.parametrize("dial", [0.3, 0.6, 1.0, 1.3])
@pytest.mark.parametrize("name", TUNED)
def test_each_step_keeps_its_share(name: str, dial: float) -> None:
    model = small_model(small_config(TUNED[name], kv_policy="exit_state"))
    texts = [random_ids(2, 300, seed) for seed in range(2)]
    if name == "token_choice":
        dial = min(dial, 1.1)
    always_runs_step_1 = name in ("depth_and_width", "token_choice")
    if always_runs_step_1 and dial == 0.3:
        with pytest.raises(ValueError, match="step 1 for every token"):
            calibrate(model, texts, dial)
        return
    result = calibrate(model, texts, dial)
    tolerance = 0.06 if name in ("token_choice", "random_depth") else 2e-3
    assert result.reached == pytest.approx(result.wanted, abs=tolerance)
    assert result.mean_depth == pytest.approx(sum(result.reached))


def test_each_recursion_keeps_the_shares_of_its_steps() -> None:
    fixed = RecursionConfig(2, "cycle", block_layers=1)
    routed = RecursionConfig(3, "cycle", TUNED["expert_choice"], block_layers=1, prelude_layers=1)
    planned = RecursionConfig(2, "cycle", TUNED["depth_and_width"], block_layers=1)
    config = replace(plain_config(8), recursion=(routed, fixed, planned))
    model, texts = small_model(config), [random_ids(2, 300, seed) for seed in range(2)]
    result = calibrate(model, texts, 0.7)
    first, last = turned((1.0, 2 / 3, 1 / 3), 0.7), turned((1.0, 0.5), 0.7)
    assert result.wanted[:5] == pytest.approx((*first, 1.0, 1.0))
    assert result.wanted[5:] == pytest.approx(last)
    assert result.reached == pytest.approx(result.wanted, abs=4e-3)
    given = (1.0, 0.5, 0.25, 1.0, 1.0, 1.0, 0.25)
    assert calibrate(model, texts, shares=given).wanted == given
    request = Request(prompt(9), 6)
    assert_exact(model, request, serve(model, [request])[0])
    with pytest.raises(ValueError, match=r"has 2 entries, but the model has 7 steps. Give one"):
        calibrate(model, texts, shares=(1.0, 0.5))
    with pytest.raises(ValueError, match="routes no tokens"):
        calibrate(small_model(replace(plain_config(4), recursion=(fixed, fixed))), texts)


def test_a_calibrated_model_generates_what_its_full_forward_pass_says_and_is_saved() -> None:
    config = small_config(TUNED["expert_choice"], kv_policy="sharing_with_update")
    model = small_model(config)
    calibrate(model, [random_ids(4, 40)], dial=0.5)
    request = Request(prompt(9), 6)
    served = serve(model, [request])[0]
    assert_exact(model, request, served)
    copy = small_model(config, seed=1)
    copy.load_state_dict(model.state_dict())
    assert serve(copy, [request])[0].tokens == served.tokens


def test_training_is_as_before() -> None:
    model = small_model(small_config(TUNED["expert_choice"])).train()
    ids = random_ids(2, 12)
    before = model(ids).logits
    calibrate(model, [random_ids(4, 40)], dial=0.4)
    assert model.training and torch.equal(model(ids).logits, before)


def test_what_cannot_be_tuned_is_an_error() -> None:
    ids = [random_ids(1, 5)]
    with pytest.raises(ValueError, match="FixedDepthRouter has no thresholds"):
        calibrate(small_model(small_config(FixedDepth())), ids)
    with pytest.raises(ValueError, match="routes no tokens"):
        calibrate(small_model(small_config(sharing="sequence", block_size=2)), ids)
    with pytest.raises(ValueError, match="held-out"):
        calibrate(small_model(small_config(TUNED["expert_choice"])), [])
