"""More steps than a model was trained with."""

import pytest
import torch

from mor_layers import (
    DecoderConfig,
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    MoEConfig,
    RandomDepth,
    RecursionConfig,
    TokenChoice,
    from_mapping,
    to_mapping,
)
from mor_layers.generation import Request, calibrate, deepened
from mor_layers.routers import Deepened
from tests.mor_layers.generation.served import assert_exact, prompt, serve
from tests.mor_layers.generation.test_engine import ALL_ROUTERS, POLICIES, model_for
from tests.mor_layers.small_models import random_ids, small_config, small_model


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("router", ALL_ROUTERS)
def test_generation_equals_the_full_forward_pass(router: str, policy) -> None:
    model = deepened(model_for(router, policy, "middle_cycle"), 2)
    request = Request(prompt(9), 5)
    (served,) = serve(model, [request], chunk_size=4)
    assert_exact(model, request, served)


def test_a_fixed_depth_is_a_longer_loop() -> None:
    model = small_model(small_config(num_recursions=2, sharing="cycle"))
    deeper, ids = deepened(model, 3), random_ids(2, 7)
    assert deeper.config.num_unrolled_layers == 5
    with torch.no_grad():
        hidden = model.embedding(ids.T)
        for _ in range(5):
            hidden = one_step(model, hidden)
        expected = model.output(model.norm(hidden)).transpose(0, 1)
    torch.testing.assert_close(deeper(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert (deeper(ids).depths == 5).all()


def test_further_steps_run_between_a_prelude_and_a_coda_of_any_length() -> None:
    model = small_model(small_config(num_recursions=2, ends=(2, 3)))
    deeper, ids = deepened(model, 3), random_ids(2, 7)
    assert deeper.config.num_unrolled_layers == 2 + 5 + 3
    trained = small_model(small_config(num_recursions=5, ends=(2, 3)))
    trained.load_state_dict(model.state_dict())
    torch.testing.assert_close(deeper(ids).logits, trained(ids).logits)


def one_step(model, hidden):
    """The block on whole sequences."""
    one = small_model(small_config(num_recursions=1, sharing="cycle")).recursions[0]
    one.layers = model.recursions[0].layers
    return one(hidden).hidden


@pytest.mark.parametrize(
    "router",
    [
        ExpertChoice(alpha=0.7, capacity_factors=(1.0, 1.0)),
        TokenChoice(),
        DepthAndWidth(continue_shares=(0.5,)),
        RandomDepth((1.0, 1.0)),
    ],
    ids=lambda router: type(router).__name__,
)
def test_the_deepest_tokens_go_on_as_before_and_end_as_before(router) -> None:
    model = small_model(small_config(router, 2, "cycle")).eval()
    with torch.no_grad():  # every token goes to the trained end
        if isinstance(router, TokenChoice):
            model.recursions[0].router.depth_bias[1] = 10.0
        if isinstance(router, DepthAndWidth):
            model.recursions[0].router.depths.values.fill_(-1e4)
    trained = model.recursions[0].router
    hidden = torch.randn(1, 3, 12)
    with torch.no_grad():
        state = hidden
        for step in range(4):
            output = one_step(model, state)
            if isinstance(router, ExpertChoice):
                weight = 0.7 * trained.logits(state, min(step, 1))[..., :1].sigmoid()
                state = state + weight * output
            elif isinstance(router, TokenChoice) and step == 3:
                gate = trained.logits(hidden, 0).softmax(-1)[..., 1:]
                state = hidden + gate * output
            else:
                state = output
        output = deepened(model, 2).recursions[0](hidden, causal_routing=True)
    assert (output.depths == 4).all()
    torch.testing.assert_close(output.hidden, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", ["expert_choice", "token_choice", "depth_and_width"])
def test_tokens_that_exit_before_the_trained_end_stay_as_they_are(router: str) -> None:
    model, ids = model_for(router, "recursion_wise").eval(), random_ids(3, 16)
    with torch.no_grad():
        before = model(ids, causal_routing=True)
        after = deepened(model, 2)(ids, causal_routing=True)
    is_early = before.depths < 3
    assert is_early.any()
    assert (after.depths[~is_early] > 3).any()
    torch.testing.assert_close(after.logits[is_early], before.logits[is_early], rtol=0, atol=1e-6)
    assert (after.depths[is_early] == before.depths[is_early]).all()


def test_what_is_kept_per_step_is_the_last_steps() -> None:
    moe = MoEConfig(4, 3, bias_update_rate=0.1)
    router = DepthAndWidth(mean_experts=2.0)
    config = DecoderConfig(
        17,
        12,
        10,
        4,
        2,
        moe=moe,
        recursion=RecursionConfig(2, "middle_cycle", router, "recursion_wise", False, "per_step"),
    )
    model = small_model(config).eval()
    mlp = model.recursions[0].layers.layers[0].mlp.router
    mlp.bias.copy_(torch.tensor([[0.0, 0, 0, 0], [3.0, 0, 0, 0]]))
    mlp.widths.values.copy_(torch.tensor([0.1, 0.2]))
    deeper = deepened(model, 2)
    own = deeper.recursions[0].layers.layers[0]
    assert own.mlp.router.bias[:, 0].tolist() == [0.0, 3.0, 3.0, 3.0]
    torch.testing.assert_close(own.mlp.router.widths.values, torch.tensor([0.1, 0.2, 0.2, 0.2]))
    for weights in (own.mlp.router.weights, own.mlp_norm.weights):
        assert len(weights) == 4
        assert weights[3] is weights[1]
    deeper(random_ids(2, 5), causal_routing=True)


def test_every_step_is_assessed_by_the_trained_router() -> None:
    model = model_for("expert_choice", "recursion_wise")
    (recursion,) = deepened(model, 2)(random_ids(2, 9)).recursions
    named = {"sampling_loss", "sampling_accuracy", "router_z_loss"}
    assert [set(decision.metrics) for decision in recursion.decisions] == [named] * 5
    terms = named - {"sampling_accuracy"}
    assert all(set(decision.losses) == terms for decision in recursion.decisions)


def test_a_deepened_loss_free_router_learns_from_all_its_tokens() -> None:
    """Whoever runs the further steps too counts as one that took the trained depth."""
    router = Deepened(TokenChoice(balancing="loss_free", balancing_coefficient=0.25), 2)
    model = small_model(small_config(router, 5, "cycle"))
    trained = model.recursions[0].router.trained
    trained.advance = advance = Noted(trained.advance)
    ids = random_ids(3, 8)
    outputs = [model(ids, ids), model(ids[:, :5], ids[:, :5])]
    sum(output.loss for output in outputs).backward()
    assert trained.scorer.weights[0].grad.abs().sum() > 0
    model.advance(outputs)
    depths = torch.cat([output.depths.flatten() for output in outputs])
    assert set(depths.tolist()) <= {1, 2, 5}
    ran = [(depths > step).sum().item() for step in range(3)]
    assert advance.given[0].tolist() == ran
    ended = [ran[0] - ran[1], ran[1] - ran[2], ran[2]]
    expected = [0.25 * ((3 * n < len(depths)) - (3 * n > len(depths))) for n in ended]
    assert trained.depth_bias.tolist() == expected
    assert any(expected)


class Noted:
    """A function that keeps what it was given."""

    def __init__(self, function) -> None:
        self.function, self.given = function, []

    def __call__(self, value) -> None:
        self.given.append(value)
        self.function(value)


def test_a_deepened_router_warms_up_in_training() -> None:
    router = Deepened(ExpertChoice(capacity_factors=(1.0, 0.25), warmup_steps=2), 1)
    model = small_model(small_config(router, 3, "cycle"))
    shares = []
    for _ in range(4):
        output = model(random_ids(1, 16), random_ids(1, 16, seed=1))
        output.loss.backward()
        shares.append([int((output.depths > step).sum()) for step in range(3)])
        model.advance([output])
    # 0.25 + 0.75 · (1, 0.5, 0, 0) of 16 tokens, for the trained last step and the further one.
    assert shares == [[16, 16, 16], [16, 10, 10], [16, 4, 4], [16, 4, 4]]
    grads = [scorer.weights[0].grad for scorer in model.recursions[0].router.trained.scorers]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_parameters_are_shared_and_none_is_new() -> None:
    model = model_for("expert_choice", "recursion_wise")
    deeper = deepened(deepened(model, 1), 1)
    assert deeper.config.recursion.router == Deepened(ALL_ROUTERS["expert_choice"], 2)
    assert {id(p) for p in deeper.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("router", ["expert_choice", "depth_and_width"])
def test_the_dial_reaches_beyond_the_trained_compute(router: str) -> None:
    text = [random_ids(4, 64)]
    model = deepened(model_for(router, "recursion_wise", "middle_cycle"), 2)
    for dial in (0.7, 1.0, 1.6):
        found = calibrate(model, text, dial)
        assert sum(found.wanted) == pytest.approx(dial * (1 + 2 / 3 + 1 / 3))
        assert found.reached[:3] == pytest.approx(found.wanted[:3], abs=0.03)
    assert found.mean_depth > 2.5


def test_settings_go_through_yaml() -> None:
    config = deepened(model_for("expert_choice", "exit_state"), 1).config
    assert from_mapping(DecoderConfig, to_mapping(config)) == config


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: deepened(small_model(small_config(sharing="sequence")), 1), "sharing 'cycle'"),
        (lambda: deepened(small_model(small_config()), 0), "extra_steps=0"),
        (lambda: Deepened(FixedDepth(), 0), "extra_steps=0"),
        (lambda: Deepened(Deepened(FixedDepth(), 1), 1), "deepened already"),
        (lambda: RecursionConfig(2, router=Deepened(FixedDepth(), 2)), "num_recursions=2"),
    ],
)
def test_wrong_uses_are_refused(make, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()
