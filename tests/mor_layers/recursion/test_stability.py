"""Small helps against instability: input injection, step embeddings, sandwich norms, random loops."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    FixedDepth,
    MoRTransformer,
    RandomLoops,
    RecursionConfig,
    Relaxation,
    RouterConfig,
    TokenChoice,
)
from mor_layers.costs import ModelShape, account, count_parameters
from mor_layers.generation import Request, deepened
from mor_layers.weights import recursive_weights, unrolled_weights
from mor_tools.formats import published_names
from tests.mor_layers.generation.served import assert_exact, prompt, serve
from tests.mor_layers.small_models import (
    ROUTERS,
    gradients,
    plain_config,
    random_ids,
    small_config,
    small_model,
)

OPTIONS = ("step_embeddings", "input_injection", "sandwich_norms")
EVERYTHING = {name: True for name in OPTIONS}


def config_with(changes: dict[str, Any], **settings: Any) -> DecoderConfig:
    config = small_config(**settings)
    assert config.recursion is not None
    return replace(config, recursion=replace(config.recursion, **changes))


@pytest.mark.parametrize("option", OPTIONS[:2])
@pytest.mark.parametrize("router", ["fixed_depth", "expert_choice", "token_choice"])
def test_a_new_step_input_changes_no_bit(option, router):
    plain = small_model(small_config(ROUTERS[router]))
    model = MoRTransformer(config_with({option: True}, router=ROUTERS[router]))
    missing, _ = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing and all(".step_input." in name for name in missing)
    ids = random_ids(2, 9)
    assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("sharing", ["middle_cycle", "middle_sequence"])
def test_a_loop_by_hand_computes_the_same(sharing):
    """Fixed depth: x <- f_r(x + e_r + g_r · x_1), layer by layer."""
    model = small_model(config_with(EVERYTHING, sharing=sharing, block_size=2, share_norms=False))
    ids = random_ids(2, 7)
    from mor_layers import StepContext, Tokens
    from mor_layers.models.layers import Rotary

    tokens = Tokens.whole_sequence(7, 2)
    rotary = Rotary.at(tokens.positions, 6, 10000.0, torch.float32)
    hidden = model.prelude(model.embedding(ids.T), StepContext(0, tokens))
    for block in model.recursions:
        origin = hidden
        for step in range(3):
            hidden = hidden + block.step_input.embeddings[step]
            if step:
                hidden = hidden + block.step_input.gains[step - 1] * origin
            for layer in block.layers.layers:
                context = StepContext(step, tokens)
                normed = layer.attention_norm(hidden, step)
                output = layer.attention(normed, context, rotary)
                hidden = hidden + layer.attention_output_norm(output, step)
                output = layer.mlp(layer.mlp_norm(hidden, step), context)
                hidden = hidden + layer.mlp_output_norm(output, step)
    hidden = model.norm(model.coda(hidden, StepContext(0, tokens)))
    torch.testing.assert_close(model(ids).logits, model.output(hidden).transpose(0, 1))


@pytest.mark.parametrize("sandwich_norms", [False, True])
@pytest.mark.parametrize("router", ["fixed_depth", "expert_choice", "token_choice"])
def test_scaled_branches_are_those_of_scaled_weights(router, sandwich_norms):
    """With λ = 1.2, three recursions and a block of four layers, the factor is 1.2 / (3 · 2)."""
    changes, block = {"sandwich_norms": sandwich_norms}, {"block_size": 4}
    plain = small_model(config_with(changes, router=ROUTERS[router], **block))
    changes["residual_scale"] = 1.2
    scaled = small_model(config_with(changes, router=ROUTERS[router], **block))
    last = (
        ("_output_norm.weights.0",)
        if sandwich_norms
        else ("attention.output.weight", "down.weight")
    )
    ids = random_ids(2, 9)
    assert (scaled(ids).logits - plain(ids).logits).abs().max() > 0.1
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.startswith("recursions.") and name.endswith(last):
                parameter.mul_(0.2)
    torch.testing.assert_close(scaled(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


def test_further_steps_keep_the_factor_of_training():
    model = small_model(config_with({"residual_scale": 1.2}))
    deeper = deepened(model, 2)
    layers = [each.recursions[0].layers.layers[0] for each in (model, deeper)]
    factors = [layer.residual_factor for layer in layers]
    assert factors == pytest.approx([1.2 / 3] * 2)


@pytest.mark.parametrize("router", ["fixed_depth", "expert_choice", "token_choice"])
def test_every_parameter_of_them_gets_a_gradient(router):
    model = small_model(config_with(EVERYTHING, router=ROUTERS[router], share_norms=False))
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    own = {
        name: gradient
        for name, gradient in gradients(model).items()
        if ".step_input." in name or "_output_norm." in name
    }
    assert len(own) == 3 + 2 + 2 * 3
    assert all(gradient.abs().max() > 0 for gradient in own.values())


@pytest.mark.parametrize(
    ("router", "policy"),
    [
        ("fixed_depth", "recursion_wise"),
        ("expert_choice", "sharing_with_update"),
        ("token_choice", "recursive_sharing"),
        ("token_choice", "exit_state"),
    ],
)
def test_decoding_equals_the_full_forward_pass(router, policy):
    changes = EVERYTHING | {"residual_scale": 2.0}
    model = small_model(config_with(changes, router=ROUTERS[router], kv_policy=policy))
    requests = [Request(prompt(length, length), 4) for length in (3, 8, 1)]
    for request, served in zip(requests, serve(model, requests, chunk_size=5), strict=True):
        assert_exact(model, request, served)


@pytest.mark.parametrize("sharing", ["sequence", "middle_sequence"])
def test_decoding_of_layers_that_repeat_one_by_one(sharing):
    model = small_model(config_with(EVERYTHING, sharing=sharing, block_size=2))
    requests = [Request(prompt(length, length), 4) for length in (2, 7)]
    for request, served in zip(requests, serve(model, requests, chunk_size=4), strict=True):
        assert_exact(model, request, served)


@pytest.mark.parametrize("sharing", ["cycle", "middle_sequence"])
@pytest.mark.parametrize("share_norms", [True, False])
def test_their_parameters_are_counted(sharing, share_norms):
    changes = EVERYTHING | {"relaxation": Relaxation(2)}
    config = config_with(changes, sharing=sharing, share_norms=share_norms, block_size=2)
    counted = count_parameters(ModelShape.from_decoder(config))
    model = MoRTransformer(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    norms = [p.numel() for name, p in model.named_parameters() if "norm" in name]
    assert counted.norms == sum(norms)


def test_a_dense_model_begins_with_a_step_input_of_zeros():
    dense = small_model(plain_config(8))
    recursion = RecursionConfig(3, step_embeddings=True, input_injection=True)
    config, weights = recursive_weights(dense.state_dict(), dense.config, recursion, "average")
    model = MoRTransformer(config)
    model.load_state_dict(dict(weights))
    assert all(not p.any() for n, p in model.named_parameters() if ".step_input." in n)


def test_further_steps_take_what_the_last_one_has():
    changes = EVERYTHING | {"relaxation": Relaxation(2, "dora")}
    model = small_model(config_with(changes, share_norms=False))
    deeper = deepened(model, 2)
    ours, theirs = deeper.state_dict(), model.state_dict()
    block = "recursions.0"
    for name in (
        "step_input.embeddings.{}",
        "step_input.gains.{}",
        "layers.layers.0.attention_output_norm.weights.{}",
        "layers.layers.0.mlp.up.deltas.{}.magnitude",
    ):
        last = 1 if "gains" in name else 2
        for step in (last, last + 1, last + 2):
            found = ours[f"{block}.{name.format(step)}"]
            assert torch.equal(found, theirs[f"{block}.{name.format(last)}"])
    assert deeper(random_ids(1, 5)).depths.unique().tolist() == [5]


def test_random_loops_follow_the_optimizer_step_and_nothing_else():
    router = RandomLoops(min_recursions=2, seed=5)
    model = small_model(small_config(router, num_recursions=4))
    twin, ids, seen = copy.deepcopy(model), random_ids(2, 9), []
    for _ in range(30):
        outputs = [m(ids) for m in (model, model, twin)]
        depths = {tuple(output.depths.unique().tolist()) for output in outputs}
        assert len(depths) == 1
        ((depth,),) = depths
        seen.append(depth)
        model.advance(outputs[:1])
        twin.advance(outputs[2:])
        torch.rand(1)  # nobody's generator matters
    assert set(seen) == {2, 3, 4}
    resumed = small_model(small_config(router, num_recursions=4), seed=1)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed(ids).depths, model(ids).depths)
    assert model.eval()(ids).depths.unique().tolist() == [4]


def test_fewer_loops_compute_what_a_model_of_so_many_steps_computes():
    model = small_model(small_config(RandomLoops(), num_recursions=3, block_size=2))
    ids = random_ids(2, 9)
    output = model(ids, labels=ids)
    while output.depths.max() == 3:
        model.advance([output])
        output = model(ids, labels=ids)
    depth = int(output.depths.max())
    config = small_config(FixedDepth(), num_recursions=depth, block_size=2)
    shallow = MoRTransformer(config)
    weights = {n: t for n, t in model.state_dict().items() if ".router." not in n}
    shallow.load_state_dict(weights)
    expected = shallow(ids, labels=ids)
    torch.testing.assert_close(output.logits, expected.logits)
    output.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(gradients(model), gradients(shallow), rtol=1e-5, atol=1e-6)


def test_steps_that_random_loops_skip_leave_a_gradient_of_zero():
    model = small_model(config_with({"relaxation": Relaxation(2)}, router=RandomLoops()))
    ids = random_ids(2, 9)
    while (output := model(ids, labels=ids)).depths.max() == 3:
        model.advance([output])
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if ".deltas.2." in name:
            assert not parameter.grad.any()


def test_the_mean_number_of_loops_is_what_accounting_counts():
    config = small_config(RandomLoops(min_recursions=2), num_recursions=4)
    tokens = [step.tokens for step in account(config, 12).steps]
    assert tokens == [12, 12, 12, 8, 4, 12]


@pytest.mark.parametrize(
    "router",
    [
        ExpertChoice(gate_bias=-2.0),
        ExpertChoice("mlp", predictor="aux_router", gate_bias=-2.0),
        TokenChoice(activation="sigmoid", gate_bias=-2.0),
    ],
)
def test_gates_begin_where_their_bias_says(router: RouterConfig):
    model = MoRTransformer(small_config(router))
    scorers = [m for m in model.modules() if type(m).__name__ == "Scorer" and m.bias is not None]
    assert [s.bias[0].item() for s in scorers] == [-2.0] * (3 if len(scorers) > 1 else 1)
    with torch.no_grad():
        for scorer in scorers:
            for weight in scorer.weights:
                weight.zero_()
    decisions = model(random_ids(1, 9)).recursions[0].decisions
    gates = decisions[0].gates if decisions[0].plan is None else decisions[0].plan[..., 1]
    assert gates is not None
    torch.testing.assert_close(gates, torch.full_like(gates, router.alpha / (1 + 2.718281828**2)))
    shape = ModelShape.from_decoder(model.config)
    assert count_parameters(shape).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: RecursionConfig(1, step_embeddings=True), "step_embeddings needs several steps"),
    (lambda: RecursionConfig(1, sandwich_norms=True), "sandwich_norms needs several steps"),
    (lambda: unrolled_weights({}, config_with({"sandwich_norms": True})), "does not support"),
    (lambda: published_names(config_with({"relaxation": Relaxation(1)})), "relaxation is set"),
    (
        lambda: recursive_weights(
            {}, plain_config(8), RecursionConfig(3, sandwich_norms=True), "lower"
        ),
        "train from scratch",
    ),
    (lambda: RecursionConfig(2, residual_scale=0.0), "residual_scale=0.0 must be above 0"),
    (lambda: RecursionConfig(1, residual_scale=1.0), "residual_scale needs several steps"),
    (lambda: RecursionConfig(2, "sequence", residual_scale=1.0), "needs cycle or middle_cycle"),
    (lambda: unrolled_weights({}, config_with({"residual_scale": 1.0})), "does not support"),
    (lambda: published_names(config_with({"residual_scale": 1.0})), "residual_scale is set"),
    (
        lambda: recursive_weights(
            {}, plain_config(8), RecursionConfig(3, residual_scale=1.0), "lower"
        ),
        "smaller than in the dense model",
    ),
    (lambda: RecursionConfig(2, router=RandomLoops(2)), "below num_recursions=2"),
    (lambda: RecursionConfig(2, router=RandomLoops(0)), "must be at least 1"),
    (lambda: ExpertChoice(combine="additive", gate_bias=1.0), "combine='additive'"),
    (lambda: TokenChoice(gate_bias=1.0), "no effect with activation='softmax'"),
    (lambda: ExpertChoice(gate_bias=float("nan")), "must be finite"),
])  # fmt: skip
def test_a_mistake_is_answered_with_what_is_allowed(mistake: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        mistake()
