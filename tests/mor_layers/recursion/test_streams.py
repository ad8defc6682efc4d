"""Hyper-connections over loops: several residual streams, read and written by each step."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mor_layers import (
    DecoderConfig,
    MoRTransformer,
    RecursionConfig,
    StepContext,
    Tokens,
)
from mor_layers.costs import account
from mor_layers.generation import Request, deepened
from mor_layers.recursion import KV_POLICIES, HyperConnections, LoopLoss
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

STATIC, DYNAMIC = HyperConnections(3, "static"), HyperConnections(3)
KINDS = [STATIC, DYNAMIC]


def streamed(config: DecoderConfig, kind: HyperConnections, **changes: object) -> DecoderConfig:
    assert config.recursion is not None
    return replace(config, recursion=replace(config.recursion, hyper_connections=kind, **changes))


def by_hand(model: MoRTransformer, ids: torch.Tensor, kind: HyperConnections) -> torch.Tensor:
    """Logits of a model of fixed depth with one layer in its block: stream by stream, token by token."""
    n, (block,) = kind.streams, model.recursions
    tokens = Tokens.whole_sequence(*ids.T.shape)
    entered = model.prelude(model.embedding(ids.T), StepContext(0, tokens))
    streams = [entered.clone() for _ in range(n)]
    for step, mixer in enumerate(block.streams.mixers):
        logits = mixer.bias.expand(*ids.T.shape, -1)
        if kind.mixing == "dynamic":
            whole = torch.cat(streams, dim=-1)
            normed = whole / (whole.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
            scale = torch.cat([value.expand(n) for value in mixer.scale])
            logits = logits + scale * F.linear(normed, mixer.weight)
        gates = logits.sigmoid()
        entering = sum(gates[..., j, None] * streams[j] for j in range(n))
        if step and block.step_input is not None:
            entering = entering + block.step_input.gains[step - 1] * entered
        output = block.layers(entering, StepContext(step, tokens))
        streams = [
            gates[..., 2 * n + j, None] * streams[j] + 2 * gates[..., n + j, None] * output
            for j in range(n)
        ]
    final = model.coda(sum(streams) / n, StepContext(0, tokens))
    return model.output(model.norm(final)).transpose(0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("injects", [False, True])
def test_streams_by_hand_compute_the_same(kind, injects):
    model = small_model(streamed(small_config(), kind, input_injection=injects))
    ids = random_ids(2, 7)
    expected = by_hand(model, ids, kind)
    expected.square().sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-4, atol=1e-4)
    assert all(g.abs().max() > 0 for n, g in wanted.items() if ".streams." in n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["expert_choice", "token_choice", "random_depth"])
def test_streams_that_agree_are_a_single_one(kind, router):
    """Streams that read 1/n, write 1 and keep nothing hold the state of the plain recursion."""
    plain = small_model(small_config(ROUTERS[router]))
    model = MoRTransformer(streamed(plain.config, kind))
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for mixer in model.recursions[0].streams.mixers:
            mixer.bias.copy_(torch.tensor([-0.6931472, 0.0, -40.0]).repeat_interleave(3))
            if mixer.scale is not None:
                mixer.scale.zero_()
    ids = random_ids(2, 9)
    outputs = []
    for each in (plain, model):
        torch.manual_seed(0)
        outputs.append(each(ids, labels=ids))
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-4, atol=1e-4)


def test_a_new_model_is_near_the_plain_one_and_its_streams_differ():
    torch.manual_seed(0)
    plain = small_model(small_config())
    model = MoRTransformer(streamed(plain.config, DYNAMIC))
    model.load_state_dict(plain.state_dict(), strict=False)
    ids = random_ids(2, 9)
    apart = (model(ids).logits - plain(ids).logits).abs().max()
    assert 0 < apart < 0.1 * plain(ids).logits.std()
    model(ids, labels=ids).loss.backward()
    for mixer in model.recursions[0].streams.mixers:
        assert mixer.bias.grad.unique().numel() == 9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("router", "policy"),
    [
        ("fixed_depth", "recursion_wise"),
        ("expert_choice", "sharing_with_update"),
        ("token_choice", "recursive_sharing"),
        ("token_choice", "exit_state"),
        ("expert_choice_first_step_too", "exit_state"),
    ],
)
def test_decoding_equals_the_full_forward_pass(router, policy, kind):
    assert policy in KV_POLICIES
    config = small_config(ROUTERS[router], kv_policy=policy)
    model = small_model(streamed(config, kind, input_injection=True, step_embeddings=True))
    requests = [Request(prompt(length, length), 4) for length in (3, 8, 1)]
    for request, served in zip(requests, serve(model, requests, chunk_size=5), strict=True):
        assert_exact(model, request, served)


def test_a_token_that_does_not_run_a_step_keeps_its_streams():
    model = small_model(streamed(small_config(ROUTERS["expert_choice"]), DYNAMIC))
    output = model(random_ids(2, 9), labels=random_ids(2, 9))
    block = model.recursions[0]
    states = block(torch.randn(9, 2, 12), keeps_states=True)
    for step in (1, 2):
        stayed = states.depths <= step
        assert torch.equal(states.states[step][stayed], states.states[step - 1][stayed])
    assert output.recursions[0].states == ()


def test_routers_score_the_mean_of_streams():
    model = small_model(streamed(small_config(ROUTERS["expert_choice"]), DYNAMIC))
    (block,) = model.recursions
    routed = []
    with block.observed(routed.append):
        block(torch.randn(9, 2, 12), keeps_states=True)
        states = torch.randn(9, 2, 36)
        block.route(states, 1, routed[0].decision)
    mean = states.unflatten(-1, (3, 12)).mean(dim=-2)
    assert torch.equal(routed[-1].logits, block.router.logits(mean, 1))


def test_a_loss_after_every_loop_reads_the_mean_of_streams():
    model = small_model(streamed(small_config(), DYNAMIC, loop_loss=LoopLoss()))
    output = model(random_ids(2, 9), labels=random_ids(2, 9))
    assert [state.shape for state in output.recursions[0].states] == [(9, 2, 12)] * 3
    output.loss.backward()
    assert all(g.abs().max() > 0 for n, g in gradients(model).items() if ".streams." in n)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_flops_are_counted(kind):
    config = streamed(small_config(ROUTERS["expert_choice"], block_size=2), kind)
    model = small_model(config)
    cost, measured = account(config, 11), measure(model, random_ids(BATCH, 11))
    assert BATCH * cost.forward.total == measured.forward
    assert BATCH * cost.training.total == measured.training
    assert cost.parameters.total == sum(p.numel() for p in model.parameters())


def test_a_folder_keeps_streams(tmp_path):
    model = small_model(streamed(small_config(), DYNAMIC))
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    ids = random_ids(1, 7)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_further_steps_mix_as_the_last_one():
    model = small_model(streamed(small_config(), DYNAMIC))
    deeper = deepened(model, 2).recursions[0].streams.mixers
    last = model.recursions[0].streams.mixers[2]
    for mixer in deeper[2:]:
        for ours, theirs in zip(mixer.parameters(), last.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_dense_model_becomes_one_with_streams():
    dense = small_model(plain_config(8))
    recursion = RecursionConfig(3, hyper_connections=DYNAMIC)
    config, weights = recursive_weights(dense.state_dict(), dense.config, recursion, "average")
    model = MoRTransformer(config)
    model.load_state_dict(dict(weights))
    _, again = recursive_weights(dense.state_dict(), dense.config, recursion, "average")
    name = "recursions.0.streams.mixers.1.weight"
    assert torch.equal(weights[name], again[name])


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: HyperConnections(1), "For one stream, leave hyper_connections out"),
    (lambda: HyperConnections(2, "full"), "HyperConnections.mixing='full' is unknown"),
    (lambda: RecursionConfig(1, hyper_connections=STATIC), "needs several steps"),
    (
        lambda: RecursionConfig(2, "sequence", hyper_connections=STATIC),
        "needs cycle or middle_cycle sharing, in which a block repeats as a whole",
    ),
    (lambda: published_names(streamed(small_config(), STATIC)), "hyper_connections is set"),
    (lambda: unrolled_weights({}, streamed(small_config(), STATIC)), "a plain decoder does not support"),
])  # fmt: skip
def test_a_mistake_is_answered_with_what_is_allowed(mistake: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        mistake()
