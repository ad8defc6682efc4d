"""Modulation of norms by step and state."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mor_layers import DecoderConfig, MoRTransformer, RecursionConfig, StepContext, Tokens
from mor_layers.costs import account
from mor_layers.generation import Request, deepened
from mor_layers.layers import NormModulation
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

RANK = NormModulation(5)


def modulated(config: DecoderConfig, **changes: object) -> DecoderConfig:
    assert config.recursion is not None
    return replace(config, recursion=replace(config.recursion, norm_modulation=RANK, **changes))


def by_hand(norm, state: Tensor, step: int) -> Tensor:
    """One token's normalised state, modulated number by number."""
    own, weight = norm.modulation, norm.weights[step if len(norm.weights) > 1 else 0]
    y = state / (state.square().mean() + 1e-5).sqrt() * weight
    rates = [100 ** (-i / 7) for i in range(8)]
    features = [math.sin(step * r) for r in rates] + [math.cos(step * r) for r in rates]
    inner = [sum(w * f for w, f in zip(row, features, strict=True)) for row in own.encoder]
    of_step = own.mixer @ torch.stack([v * v.sigmoid() for v in inner])
    signal = torch.stack([of_step[i] + own.down[i] @ y for i in range(len(of_step))])
    signal = signal * signal.sigmoid()
    h = len(y)
    return torch.stack([y[c] * (1 + own.up[c] @ signal) + own.up[h + c] @ signal for c in range(h)])


def loops_by_hand(model: MoRTransformer, ids: Tensor) -> Tensor:
    """Logits of a model of fixed depth with one layer in its block, its norms token by token."""
    tokens = Tokens.whole_sequence(*ids.T.shape)
    state = model.prelude(model.embedding(ids.T), StepContext(0, tokens))
    (layer,) = model.recursions[0].layers.layers

    def normed(norm, states: Tensor, step: int) -> Tensor:
        rows = [by_hand(norm, row, step) for row in states.flatten(0, 1)]
        return torch.stack(rows).view_as(states)

    for step in range(3):
        context = StepContext(step, tokens)
        rotary = rotary_of(model, context)
        state = state + layer.attention(normed(layer.attention_norm, state, step), context, rotary)
        state = state + layer.mlp(normed(layer.mlp_norm, state, step), context)
    return model.output(model.norm(model.coda(state, StepContext(0, tokens)))).transpose(0, 1)


def rotary_of(model: MoRTransformer, context: StepContext):
    from mor_layers.models.rotary import Rotary

    stack = model.recursions[0].layers
    return Rotary.at(context.projected_positions, stack.rotary_size, stack.rope_base, torch.float32)


@pytest.mark.parametrize("share_norms", [True, False])
def test_norms_modulated_by_hand_compute_the_same(share_norms):
    model = small_model(modulated(small_config(share_norms=share_norms)))
    ids = random_ids(2, 5)
    expected = loops_by_hand(model, ids)
    expected.square().sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-4, atol=1e-4)
    assert all(g.abs().max() > 0 for n, g in wanted.items() if ".modulation." in n)


def test_a_new_model_equals_the_one_without_modulation():
    plain = small_model(small_config(ROUTERS["expert_choice"]))
    model = MoRTransformer(modulated(plain.config))
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert len(missing) == 2 * 4 and all(".modulation." in name for name in missing)
    ids = random_ids(2, 9)
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_steps_of_the_same_state_differ_and_so_do_states_of_the_same_step():
    layer = small_model(modulated(small_config())).recursions[0].layers.layers[0]
    own = layer.mlp_norm.modulation
    ones = torch.ones(1, 1, 12)
    changes = [own(ones, step) for step in range(3)]
    assert not torch.allclose(changes[0], changes[1]) and not torch.allclose(changes[1], changes[2])
    assert not torch.allclose(own(2 * ones, 1), 2 * changes[1])


def test_rows_of_several_steps_are_modulated_as_one_by_one():
    own = small_model(modulated(small_config())).recursions[0].layers.layers[0].mlp_norm.modulation
    states, steps = torch.randn(4, 1, 12), torch.tensor([[2], [0], [1], [2]])
    together = own(states, steps)
    for row, step in enumerate(steps.flatten().tolist()):
        torch.testing.assert_close(together[row], own(states[row], step))


@pytest.mark.parametrize(
    ("router", "policy"),
    [
        ("fixed_depth", "recursion_wise"),
        ("expert_choice", "sharing_with_update"),
        ("token_choice", "recursive_sharing"),
    ],
)
def test_decoding_equals_the_full_forward_pass(router, policy):
    model = small_model(modulated(small_config(ROUTERS[router], kv_policy=policy)))
    requests = [Request(prompt(length, length), 4) for length in (3, 8, 1)]
    for request, served in zip(requests, serve(model, requests, chunk_size=5), strict=True):
        assert_exact(model, request, served)


@pytest.mark.parametrize("sharing", ["middle_cycle", "sequence"])
def test_parameters_and_flops_are_counted(sharing):
    config = modulated(small_config(sharing=sharing, block_size=2))
    model = small_model(config)
    cost, measured = account(config, 11), measure(model, random_ids(BATCH, 11))
    assert BATCH * cost.forward.total == measured.forward
    assert BATCH * cost.training.total == measured.training
    assert cost.parameters.total == sum(p.numel() for p in model.parameters())


def test_a_folder_keeps_it_and_further_steps_have_encodings_of_their_own(tmp_path):
    model = small_model(modulated(small_config()))
    save_model(model, tmp_path / "model")
    loaded, ids = load_model(tmp_path / "model"), random_ids(1, 7)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    deeper = deepened(model, 1)
    torch.testing.assert_close(deeper(ids).logits, loops_of(deeper, ids))


def loops_of(model: MoRTransformer, ids: Tensor) -> Tensor:
    """Four steps, run one by one."""
    tokens = Tokens.whole_sequence(*ids.T.shape)
    state = model.prelude(model.embedding(ids.T), StepContext(0, tokens))
    for step in range(4):
        state = model.recursions[0].layers(state, StepContext(step, tokens))
    return model.output(model.norm(model.coda(state, StepContext(0, tokens)))).transpose(0, 1)


def test_a_dense_model_becomes_one_with_modulated_norms():
    dense = small_model(plain_config(8))
    recursion = RecursionConfig(3, norm_modulation=RANK)
    config, weights = recursive_weights(dense.state_dict(), dense.config, recursion, "average")
    plain, own = recursive_weights(dense.state_dict(), dense.config, RecursionConfig(3), "average")
    model, without = MoRTransformer(config), MoRTransformer(plain)
    model.load_state_dict(dict(weights))
    without.load_state_dict(dict(own))
    assert torch.equal(model(random_ids(1, 5)).logits, without(random_ids(1, 5)).logits)
    first, second = (f"recursions.0.layers.layers.{i}.mlp_norm.modulation.down" for i in (0, 1))
    assert not torch.equal(weights[first], weights[second])


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: NormModulation(0), "NormModulation.rank=0 must be at least 1"),
    (lambda: RecursionConfig(1, norm_modulation=RANK), "needs several steps"),
    (
        lambda: RecursionConfig(2, kv_policy="exit_state", norm_modulation=RANK),
        "projects an exited token once for all later steps",
    ),
    (lambda: published_names(modulated(small_config())), "norm_modulation is set"),
    (lambda: unrolled_weights({}, modulated(small_config())), "a plain decoder does not support"),
])  # fmt: skip
def test_a_mistake_is_answered_with_what_is_allowed(mistake: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        mistake()
