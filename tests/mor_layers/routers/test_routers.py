"""Routers: their logits, choices, losses and state."""

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor_layers import (
    ExpertChoice,
    FixedDepth,
    RandomDepth,
    RecursionBlock,
    RecursionConfig,
    Router,
    RouterConfig,
    RoutingDecision,
    TokenChoice,
    Tokens,
    from_mapping,
    register_router,
)
from mor_layers.layers import PointwiseLayers
from mor_layers.routers import FixedDepthRouter, registered_routers
from mor_layers.routers import registry as router_registry
from mor_layers.routers.scorer import Scorer
from tests.mor_layers.small_models import HIDDEN_SIZE, columns, random_states, randomized
from tests.oracles import loops as reference

NUM_RECURSIONS = 3


def build(config: RouterConfig, num_recursions: int = NUM_RECURSIONS) -> Router:
    return randomized(config.build(HIDDEN_SIZE, num_recursions))


def decide_first(router: Router, hidden: torch.Tensor, **options) -> RoutingDecision:
    whole = RoutingDecision.everything(Tokens.whole_sequence(*hidden.shape[:2]))
    logits = router.logits(hidden, 0)
    return router.assess(logits, 0, whole, router.decide(logits, 0, whole, **options))


@pytest.mark.parametrize("architecture", ["linear", "mlp"])
@pytest.mark.parametrize(("n", "b", "c"), [(1, 1, 1), (5, 2, 3)])
def test_a_scorer_equals_matrix_products_token_by_token(architecture, n, b, c):
    scorer, hidden = randomized(Scorer(architecture, HIDDEN_SIZE, c)), random_states(n, b)
    slow = torch.stack([
        torch.stack([reference.score(scorer.state_dict(), token) for token in row])
        for row in hidden
    ])  # fmt: skip
    torch.testing.assert_close(scorer(hidden), slow, rtol=1e-5, atol=1e-6)
    sizes = [tuple(weight.shape) for weight in scorer.parameters()]
    wide = 2 * HIDDEN_SIZE
    expected = [(c, HIDDEN_SIZE)] if architecture == "linear" else [(wide, HIDDEN_SIZE), (c, wide)]
    assert sizes == expected


def test_scorers_compute_in_fp32_whatever_the_weights_are():
    scorer = randomized(Scorer("mlp", HIDDEN_SIZE, 2)).bfloat16()
    hidden = random_states(3, 1).bfloat16()
    logits = scorer(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, scorer.float()(hidden.float()))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.1, 1.0])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "none"])
def test_expert_choice_gates_are_alpha_times_the_activated_logit(activation, alpha, temperature):
    router = build(ExpertChoice(activation=activation, alpha=alpha, temperature=temperature))
    hidden = random_states(6, 2)
    decision = decide_first(router, hidden)
    for i in range(6):
        for j in range(2):
            logit = router.scorers[0].weights[0][0] @ hidden[i, j] / temperature
            score = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "none": lambda x: x}[activation]
            torch.testing.assert_close(decision.gates[i, j], alpha * score(logit))


def test_expert_choice_has_one_router_per_step():
    router = build(ExpertChoice(predictor="aux_router"))
    assert len(router.scorers) == len(router.predictors) == NUM_RECURSIONS
    hidden = random_states(4, 1)
    logits = [router.logits(hidden, step) for step in range(NUM_RECURSIONS)]
    assert not any(torch.allclose(logits[0], other) for other in logits[1:])


def test_the_aux_routers_gradient_reaches_only_itself():
    router = build(ExpertChoice(predictor="aux_router", capacity_factors=(0.5, 0.4, 0.3)))
    hidden = random_states(7, 2)
    decide_first(router, hidden).losses["sampling_loss"].backward()
    assert hidden.grad is None or not hidden.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in router.scorers.parameters())
    assert router.predictors[0].weights[0].grad.any()


def test_the_aux_loss_trains_the_router_and_reaches_the_states():
    router = build(ExpertChoice(capacity_factors=(0.5, 0.4, 0.3)))
    hidden = random_states(7, 2)
    decide_first(router, hidden).losses["sampling_loss"].backward()
    assert hidden.grad.any()
    assert router.scorers[0].weights[0].grad.any()


def test_coefficients_multiply_the_losses_but_not_the_metrics():
    hidden = random_states(7, 2)
    router = build(
        ExpertChoice(
            capacity_factors=(0.5, 0.4, 0.3), predictor_coefficient=0.25, z_loss_coefficient=0.5
        )
    )
    decision = decide_first(router, hidden)
    for name, coefficient in (("sampling_loss", 0.25), ("router_z_loss", 0.5)):
        expected = coefficient * decision.metrics[name]
        torch.testing.assert_close(decision.losses[name].detach(), expected)
        assert not decision.metrics[name].requires_grad


@pytest.mark.parametrize(
    ("predictor", "coefficient", "expected"),
    [("aux_loss", None, 0.001), ("aux_router", None, 1.0), ("aux_router", 0.0, 0.0)],
)
def test_the_predictors_loss_has_a_default_weight(predictor, coefficient, expected):
    config = ExpertChoice(predictor=predictor, predictor_coefficient=coefficient)
    assert config.predictor_weight == expected


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("predictor", ["aux_loss", "aux_router"])
def test_causal_expert_choice_follows_the_predictor(predictor, threshold):
    router = build(
        ExpertChoice(
            predictor=predictor, threshold=threshold, capacity_factors=(0.5, 0.5, 0.5), alpha=2.0
        )
    )
    hidden = random_states(9, 2)
    decision = decide_first(router, hidden, causal=True)
    scorer = router.scorers[0] if predictor == "aux_loss" else router.predictors[0]
    probabilities = torch.sigmoid(scorer(hidden)[..., 0])
    assert torch.equal(decision.is_selected(9), probabilities > threshold)
    gates = 2.0 * torch.sigmoid(router.scorers[0](hidden)[..., 0])
    torch.testing.assert_close(decision.gates, gates.gather(0, decision.rows))


def test_a_step_of_full_capacity_keeps_everything_causally_too():
    router = build(ExpertChoice(threshold=0.99))
    for causal in (False, True):
        assert decide_first(router, random_states(5, 2), causal=causal).rows is None


@given(
    final=st.sampled_from([0.1, 1 / 3, 0.5, 1.0]),
    warmup_steps=st.integers(0, 50),
    training_steps=st.integers(0, 60),
)
def test_capacities_warm_up_along_a_cosine(final, warmup_steps, training_steps):
    router = build(ExpertChoice(capacity_factors=(1.0, final), warmup_steps=warmup_steps), 2)
    router.training_steps.fill_(training_steps)
    assert router.capacity_factor(0) == 1.0
    expected = reference.capacity_factor(final, training_steps, warmup_steps)
    assert router.capacity_factor(1) == pytest.approx(expected, abs=1e-12)


def test_the_warm_up_starts_full_passes_half_way_and_ends_at_the_factor():
    router, seen = build(ExpertChoice(capacity_factors=(1.0, 0.2), warmup_steps=4), 2), []
    for _ in range(7):
        seen.append(router.capacity_factor(1))
        assert router.eval().capacity_factor(1) == router.train().capacity_factor(1)
        router.advance(torch.tensor([8.0, 8.0]))
    half_cosine = [0.5 * (1 + math.cos(math.pi * min(1, i / 4))) for i in range(7)]
    assert seen == pytest.approx([0.2 + 0.8 * value for value in half_cosine])
    assert (seen[0], seen[2], seen[-1]) == pytest.approx((1.0, 0.6, 0.2))


def test_the_warm_up_goes_on_where_a_checkpoint_left_it():
    config = ExpertChoice(capacity_factors=(1.0, 0.2), warmup_steps=10)
    router = build(config, 2)
    for _ in range(6):
        router.advance(torch.zeros(2))
    fresh = build(config, 2)
    assert fresh.capacity_factor(1) == 1.0  # looked at before loading, which must not stick
    fresh.load_state_dict(router.state_dict())
    assert fresh.capacity_factor(1) == router.capacity_factor(1) < 1.0
    assert copy.deepcopy(fresh).capacity_factor(1) == fresh.capacity_factor(1)


@pytest.mark.parametrize("recompute", [False, True])
def test_running_the_model_does_not_move_the_warm_up(recompute):
    router = build(ExpertChoice(warmup_steps=10))
    block = RecursionBlock(PointwiseLayers(torch.nn.Tanh()), router, recompute=recompute)
    for _ in range(3):
        block(random_states(6, 2)).hidden.sum().backward()
    assert int(router.training_steps) == 0


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_tokens_gate_is_its_depths_probability_without_the_bias(activation):
    alpha = 1.0 if activation == "softmax" else 0.3
    router = build(TokenChoice(activation=activation, alpha=alpha, balancing="loss_free"))
    router.depth_bias.copy_(torch.tensor([0.0, 5.0, 0.0]))
    hidden = random_states(6, 2)
    logits = router.logits(hidden, 0)
    plan = decide_first(router, hidden).plan
    probabilities = logits.softmax(-1) if activation == "softmax" else alpha * logits.sigmoid()
    assert (plan[..., 0] == 1).all()
    torch.testing.assert_close(plan[..., 1], probabilities[..., 1])


def test_token_choice_scores_tokens_only_before_the_first_step():
    router, hidden = build(TokenChoice()), random_states(5, 1)
    assert [router.logits(hidden, step) is None for step in range(3)] == [False, True, True]


@given(
    num_recursions=st.integers(1, 4),
    batches=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=4),
)
def test_the_loss_free_bias_moves_towards_rare_depths(num_recursions, batches):
    router = build(TokenChoice(balancing="loss_free", balancing_coefficient=0.25), num_recursions)
    bias = [0.0] * num_recursions
    for depths in batches:
        depths = [min(depth, num_recursions - 1) for depth in depths]
        ran = [sum(depth >= step for depth in depths) for step in range(num_recursions)]
        router.advance(torch.tensor(ran))
        bias = reference.loss_free_update(bias, depths, 0.25)
    assert router.depth_bias.tolist() == bias


def test_an_even_choice_of_depths_leaves_the_bias_alone():
    router = build(TokenChoice(balancing="loss_free"), 4)
    router.advance(torch.tensor([8, 6, 4, 2]))
    assert not router.depth_bias.any()


@pytest.mark.parametrize("balancing", ["loss", "none"])
def test_without_the_loss_free_bias_nothing_is_moved(balancing):
    router = build(TokenChoice(balancing=balancing))
    router.advance(torch.tensor([9, 3, 0]))
    assert not router.depth_bias.any()


@pytest.mark.parametrize(
    ("balancing", "given", "weight", "has_loss"),
    [
        ("loss", None, 0.1, True),
        ("loss", 0.5, 0.5, True),
        ("loss_free", None, 0.001, False),
        ("none", None, 0.0, False),
    ],
)
def test_only_balancing_by_loss_adds_one(balancing, given, weight, has_loss):
    config = TokenChoice(balancing=balancing, balancing_coefficient=given)
    decision = decide_first(build(config), random_states(6, 2))
    assert config.balancing_weight == weight
    assert ("balancing_loss" in decision.losses) == has_loss
    if has_loss:
        expected = weight * decision.metrics["balancing_loss"]
        torch.testing.assert_close(decision.losses["balancing_loss"].detach(), expected)


@pytest.mark.parametrize("factors", [None, (1.0, 0.5, 0.5), (0.4, 0.4, 0.1)])
def test_random_depth_keeps_its_shares_exactly_and_afresh_each_time(factors):
    config = RandomDepth(factors)
    block = RecursionBlock(PointwiseLayers(torch.nn.Tanh()), build(config))
    torch.manual_seed(0)
    outputs = [block(random_states(20, 2)) for _ in range(2)]
    shares = config.capacity_factors_for(3)
    for output in outputs:
        counts = [decision.tokens.shape[0] for decision in output.decisions]
        assert counts == [max(1, math.floor(share * 20)) for share in shares]
    assert not torch.equal(outputs[0].depths, outputs[1].depths)


def test_random_depth_follows_from_positions_alone_where_routing_is_causal():
    block = RecursionBlock(PointwiseLayers(torch.nn.Tanh()), build(RandomDepth((0.6, 0.3, 0.1))))
    output, again = (block(random_states(n, 2), causal_routing=True) for n in (2000, 50))
    shares = [decision.tokens.count.item() / 4000 for decision in output.decisions]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    assert torch.equal(output.depths[:50], again.depths)
    assert torch.equal(output.depths[:, 0], output.depths[:, 1])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FixedDepth(), (1.0, 1.0, 1.0)),
        (RandomDepth(), (1.0, 2 / 3, 1 / 3)),
        (ExpertChoice(), (1.0, 2 / 3, 1 / 3)),
        (ExpertChoice(capacity_factors=(1.0, 0.5, 0.2)), (1.0, 0.5, 0.2)),
        (TokenChoice(), None),
    ],
)
def test_settings_tell_the_shares_they_fix(config, expected):
    assert config.capacity_factors_for(3) == expected


@pytest.mark.parametrize("name", ["depth_bias", "training_steps"])
def test_state_that_is_not_learnt_is_a_buffer_that_keeps_its_precision(name):
    config = TokenChoice(balancing="loss_free") if name == "depth_bias" else ExpertChoice()
    router = build(config)
    before = getattr(router, name).dtype
    router.bfloat16()
    assert name in router.state_dict()
    assert getattr(router, name).dtype == before
    assert next(router.parameters()).dtype == torch.bfloat16


def test_a_router_can_be_built_without_memory_and_given_it_later():
    with torch.device("meta"):
        router = TokenChoice().build(HIDDEN_SIZE, 3)
    assert router.to_empty(device="cpu").depth_bias.device.type == "cpu"


def test_no_router_selects_padding():
    is_padding = columns([0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1]).bool()
    whole = RoutingDecision.everything(Tokens.whole_sequence(6, 2, is_padding=is_padding))
    for config in (FixedDepth(), RandomDepth(), ExpertChoice(), TokenChoice()):
        for causal in (False, True):
            router, decision = build(config), whole
            for step in range(NUM_RECURSIONS):
                hidden = random_states(*decision.tokens.shape)
                logits = router.logits(hidden, step)
                decision = router.decide(logits, step, decision, causal)
                kept = decision.tokens
                real = kept.positions[~kept.is_padding[:, 0], 0].tolist()
                assert set(real) <= {0, 2, 3, 5}
                assert kept.is_padding[:, 1].all()


@dataclass(frozen=True)
class Halving(RouterConfig):
    """Keeps the first half of what ran before."""

    minimum: int = 1
    """Fewest tokens kept."""

    def build(self, hidden_size: int, num_recursions: int) -> "HalvingRouter":
        return HalvingRouter(self.minimum, num_recursions)


class HalvingRouter(Router):
    def __init__(self, minimum: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.minimum = minimum

    def decide(self, logits, step, previous, causal=False):
        count = max(self.minimum, previous.tokens.shape[0] // 2)
        order = torch.arange(previous.tokens.shape[0])[:, None]
        return previous.keep_where((order < count).expand(previous.tokens.shape))


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(router_registry, "_REGISTRY", registered_routers())


def test_a_registered_router_can_be_named_in_settings(registry):
    register_router("halving")(Halving)
    config = from_mapping(
        RecursionConfig, {"num_recursions": 3, "router": {"type": "halving", "minimum": 2}}
    )
    assert config.router == Halving(minimum=2)
    block = RecursionBlock(PointwiseLayers(torch.nn.Tanh()), config.router.build(4, 3))
    assert [d.tokens.shape[0] for d in block(random_states(8, 2, 4)).decisions] == [4, 2, 2]


def test_a_router_can_be_named_by_its_import_path():
    path = f"{FixedDepth.__module__}:FixedDepth"
    values = {"num_recursions": 2, "router": {"type": path}}
    assert from_mapping(RecursionConfig, values, may_import=True).router == FixedDepth()


def test_a_module_is_imported_only_where_its_origin_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit('a setting made this run')")
    monkeypatch.syspath_prepend(tmp_path)
    values = {"num_recursions": 2, "router": {"type": "hostile:Router"}}
    with pytest.raises(ValueError, match=r"would import the module 'hostile'.*trust_remote_code"):
        from_mapping(RecursionConfig, values)
    with pytest.raises(SystemExit, match="made this run"):
        from_mapping(RecursionConfig, values, may_import=True)


def test_the_working_folder_is_not_searched_implicitly(tmp_path, monkeypatch):
    (tmp_path / "lying_here.py").write_text("raise SystemExit('it was run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # as `python -m` does
    values = {"num_recursions": 2, "router": {"type": "lying_here:Router"}}
    with pytest.raises(ValueError, match=r"lies in the working folder.*add it to PYTHONPATH"):
        from_mapping(RecursionConfig, values, may_import=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match="it was run"):
        from_mapping(RecursionConfig, values, may_import=True)


def test_a_name_is_taken_once(registry):
    register_router("halving")(Halving)
    register_router("halving")(Halving)
    with pytest.raises(ValueError, match=r"'halving' is registered already \(Halving\)"):

        @register_router("halving")
        @dataclass(frozen=True)
        class Other(Halving):
            pass


def test_the_list_of_registered_routers_is_a_copy():
    registered_routers().clear()
    assert {"expert_choice", "token_choice", "fixed_depth", "random_depth"} <= set(
        registered_routers()
    )


def test_settings_are_frozen_and_replaceable():
    config = replace(ExpertChoice(), alpha=0.2)
    assert config.alpha == 0.2
    with pytest.raises(AttributeError):
        config.alpha = 0.3


def test_fixed_depth_passes_the_blocks_output_on():
    router, output = FixedDepthRouter(2), torch.rand(3, 1, 2)
    decision = decide_first(router, torch.rand(3, 1, 2))
    assert router.combine(0, torch.rand(3, 1, 2), output, decision, None) is output
