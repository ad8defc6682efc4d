"""History injection with step conditioning."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mor_layers import DecoderConfig, MoRTransformer, RecursionConfig, StepContext, Tokens
from mor_layers.costs import account
from mor_layers.generation import Request, deepened
from mor_layers.recursion import HistoryInjection, HyperConnections, LoopLoss
from mor_layers.weights import load_model, recursive_weights, save_model, unrolled_weights
from mor_tools.formats import published_names
from tests.mor_layers.costs.test_accounting import BATCH, measure
from tests.mor_layers.generation.served import assert_exact, prompt, serve
from tests.mor_layers.small_models import (
    ROUTERS,
    gradients,
    plain_config,
    random_ids,
    small_config,
    small_model,
)

ONE = HistoryInjection(1)


def with_history(
    config: DecoderConfig, history: HistoryInjection = ONE, **changes: object
) -> DecoderConfig:
    assert config.recursion is not None
    return replace(config, recursion=replace(config.recursion, history=history, **changes))


def by_hand(model: MoRTransformer, ids: Tensor, history: HistoryInjection) -> Tensor:
    """Logits of a model of fixed depth: a list of states, indexed as in the paper."""
    (block,) = model.recursions
    steps, tokens = block.router.num_recursions, Tokens.whole_sequence(*ids.T.shape)
    states = [model.prelude(model.embedding(ids.T), StepContext(0, tokens))]
    for step in range(steps):
        state = entering = states[step]
        for j in range(1, min(history.window, max(step - 1, 0)) + 1):
            entering = entering + block.history.mixing[j - 1] * (states[step - j] - state)
        if step and block.step_input is not None:
            entering = entering + block.step_input.gains[step - 1] * states[0]
        output = block.layers(entering, StepContext(step, tokens))
        gate: Tensor | float = 1.0
        if history.step_gate:
            psi = []
            for time in (step / steps, 1 / steps):
                for turn in (math.pi, 2 * math.pi):
                    psi += [math.sin(turn * time), math.cos(turn * time)]
            gate = 1 + block.history.gate[0] @ torch.tensor(psi)
        states.append(state + gate * (output - state))
    final = model.coda(states[-1], StepContext(0, tokens))
    return model.output(model.norm(final)).transpose(0, 1)


@pytest.mark.parametrize(
    "history", [HistoryInjection(), HistoryInjection(1, step_gate=False), HistoryInjection(3)]
)
@pytest.mark.parametrize("injects", [False, True])
def test_history_by_hand_computes_the_same(history, injects):
    config = with_history(small_config(num_recursions=5), history, input_injection=injects)
    model, ids = small_model(config), random_ids(2, 7)
    expected = by_hand(model, ids, history)
    expected.square().sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    logits.square().sum().backward()
    for name, gradient in gradients(model).items():
        scale = wanted[name].abs().max()
        torch.testing.assert_close(gradient / scale, wanted[name] / scale, rtol=1e-4, atol=1e-5)
    assert all(g.abs().max() > 0 for n, g in wanted.items() if ".history." in n)


@pytest.mark.parametrize("router", ["fixed_depth", "expert_choice", "token_choice", "random_depth"])
def test_a_new_model_is_the_plain_loop(router):
    plain = small_model(small_config(ROUTERS[router]))
    model = MoRTransformer(with_history(plain.config))
    model.load_state_dict(plain.state_dict(), strict=False)
    ids, outputs = random_ids(2, 9), []
    for each in (plain, model):
        torch.manual_seed(0)
        outputs.append(each(ids, labels=ids))
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits)


def test_the_router_combines_the_state_and_not_the_history():
    model = small_model(with_history(small_config(ROUTERS["expert_choice"])))
    (block,) = model.recursions
    routed = []
    with block.observed(routed.append):
        block(torch.randn(9, 2, 12))
    decision = routed[1].decision
    carried, output = (
        torch.randn(*decision.tokens.shape, 24),
        torch.randn(*decision.tokens.shape, 12),
    )
    new = block.combine(1, carried, output, decision, None)
    assert torch.equal(new[..., 12:], carried[..., :12])
    gate = 1 + block.history.gate[0] @ block.history._features(1, output)
    changed = carried[..., :12] + gate * (output - carried[..., :12])
    expected = block.router.combine(1, carried[..., :12], changed, decision, None)
    assert torch.equal(new[..., :12], expected)


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
    config = small_config(ROUTERS[router], kv_policy=policy)
    model = small_model(with_history(config, input_injection=True, step_embeddings=True))
    requests = [Request(prompt(length, length), 4) for length in (3, 8, 1)]
    for request, served in zip(requests, serve(model, requests, chunk_size=5), strict=True):
        assert_exact(model, request, served)


def test_a_loss_after_every_loop_reads_the_states():
    model = small_model(with_history(small_config(), loop_loss=LoopLoss()))
    output = model(random_ids(2, 9), labels=random_ids(2, 9))
    assert [state.shape for state in output.recursions[0].states] == [(9, 2, 12)] * 3
    output.loss.backward()
    assert all(g.abs().max() > 0 for n, g in gradients(model).items() if ".history." in n)


def test_parameters_and_flops_are_counted():
    config = with_history(small_config(ROUTERS["expert_choice"], block_size=2))
    model = small_model(config)
    cost, measured = account(config, 11), measure(model, random_ids(BATCH, 11))
    assert BATCH * cost.forward.total == measured.forward
    assert BATCH * cost.training.total == measured.training
    assert cost.parameters.total == sum(p.numel() for p in model.parameters())


def test_a_folder_keeps_it_and_the_grid_of_times_is_rescaled_to_further_steps(tmp_path):
    model = small_model(with_history(small_config()))
    save_model(model, tmp_path / "model")
    loaded, ids = load_model(tmp_path / "model"), random_ids(1, 7)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    deeper = deepened(model, 2)
    assert deeper.recursions[0].history.num_steps == 5
    torch.testing.assert_close(deeper(ids).logits, by_hand(deeper, ids, ONE), rtol=1e-4, atol=1e-4)


def test_a_dense_model_becomes_one_with_history():
    dense = small_model(plain_config(8))
    models = []
    for recursion in (RecursionConfig(3), RecursionConfig(3, history=ONE)):
        config, weights = recursive_weights(dense.state_dict(), dense.config, recursion, "average")
        models.append(MoRTransformer(config))
        models[-1].load_state_dict(dict(weights))
    ids = random_ids(1, 5)
    torch.testing.assert_close(models[1](ids).logits, models[0](ids).logits)


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: HistoryInjection(0), "HistoryInjection.window=0 must be at least 1"),
    (lambda: RecursionConfig(2, history=ONE), "history needs at least 3 steps"),
    (lambda: RecursionConfig(3, history=HistoryInjection()), "window=2 must be at most 1"),
    (
        lambda: RecursionConfig(3, history=ONE, hyper_connections=HyperConnections(2)),
        "both say what a token carries between steps",
    ),
    (lambda: RecursionConfig(3, "sequence", history=ONE), "needs cycle or middle_cycle sharing"),
    (lambda: published_names(with_history(small_config())), "history is set"),
    (lambda: unrolled_weights({}, with_history(small_config())), "a plain decoder does not support"),
])  # fmt: skip
def test_a_mistake_is_answered_with_what_is_allowed(mistake: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        mistake()
