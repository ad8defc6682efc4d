"""Attention or MLPs of which each step has its own, beside what the steps share."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mor_layers import (
    DecoderConfig,
    MoEConfig,
    MoRTransformer,
    RandomLoops,
    RecursionConfig,
    Relaxation,
)
from mor_layers.costs import ModelShape, account, count_parameters
from mor_layers.generation import Request, deepened
from mor_layers.layers import Sublayer
from mor_layers.recursion import KVPolicy
from mor_layers.weights import load_model, recursive_weights, save_model, unrolled_weights
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

CHOICES: list[tuple[Sublayer, ...]] = [("attention",), ("mlp",), ("attention", "mlp")]
PARTS = {"attention": ("query", "key", "value", "output"), "mlp": ("gate", "up", "down")}
QWEN = {"qkv_bias": True, "qk_norm": True}


def own(config: DecoderConfig, *sublayers: Sublayer, **changes: object) -> DecoderConfig:
    assert config.recursion is not None
    return replace(config, recursion=replace(config.recursion, own_per_step=sublayers, **changes))


@pytest.mark.parametrize("sharing", ["middle_cycle", "sequence"])
@pytest.mark.parametrize("sublayers", CHOICES)
def test_it_is_the_plain_model_with_the_weights_of_each_step(sublayers, sharing):
    config = own(small_config(sharing=sharing, block_size=2), *sublayers, share_norms=False)
    model = small_model(replace(config, **QWEN))
    plain_settings, weights = unrolled_weights(model.state_dict(), model.config)
    plain = MoRTransformer(plain_settings)
    plain.load_state_dict(dict(weights))
    layers = plain.recursions[0].layers.layers
    first, later = (1, 3) if sharing == "middle_cycle" else (0, 1)  # one layer at two steps
    for sublayer, names in PARTS.items():
        for name in names:
            pair = [getattr(getattr(layers[i], sublayer), name).weight for i in (first, later)]
            assert torch.equal(*pair) == (sublayer not in sublayers)
    ids = random_ids(2, 9)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("sublayers", CHOICES)
@pytest.mark.parametrize(
    ("router", "policy"),
    [
        ("fixed_depth", "recursion_wise"),
        ("expert_choice", "sharing_with_update"),
        ("token_choice", "recursion_wise"),
    ],
)
def test_equal_weights_at_every_step_are_shared_weights(router, policy, sublayers):
    """Logits, and gradients: a shared weight's is the sum over the steps that use it."""
    shared = small_model(replace(small_config(ROUTERS[router], kv_policy=policy), **QWEN))
    model = MoRTransformer(own(shared.config, *sublayers))
    theirs, state = shared.state_dict(), {}
    for name in model.state_dict():
        state[name] = theirs[_of_all_steps(name, theirs)]
    model.load_state_dict(state)
    ids = random_ids(2, 9)
    expected, output = (each(ids, labels=ids) for each in (shared, model))
    torch.testing.assert_close(output.logits, expected.logits)
    expected.loss.backward()
    output.loss.backward()
    sums = {name: torch.zeros_like(gradient) for name, gradient in gradients(shared).items()}
    for name, gradient in gradients(model).items():
        sums[_of_all_steps(name, theirs)] += gradient
    torch.testing.assert_close(sums, gradients(shared), rtol=1e-5, atol=1e-6)


def _of_all_steps(name: str, shared: dict[str, torch.Tensor]) -> str:
    if name in shared:
        return name
    module, kind, _ = name.rsplit(".", 2)
    return f"{module}.weights.0" if "_norm" in module else f"{module}.{kind[:-1].rstrip('e')}"


@pytest.mark.parametrize("sublayers", CHOICES)
@pytest.mark.parametrize(
    ("router", "policy"),
    [
        ("fixed_depth", "recursion_wise"),
        ("expert_choice", "sharing_with_update"),
        ("token_choice", "recursion_wise"),
    ],
)
def test_decoding_equals_the_full_forward_pass(router, policy: KVPolicy, sublayers):
    config = own(small_config(ROUTERS[router], kv_policy=policy), *sublayers, share_norms=False)
    model = small_model(replace(config, **QWEN))
    requests = [Request(prompt(length, length), 4) for length in (3, 8, 1)]
    for request, served in zip(requests, serve(model, requests, chunk_size=5), strict=True):
        assert_exact(model, request, served)


def test_attention_of_its_own_beside_shared_experts():
    """As in SMELT: decoding, parameters, and a gradient for every weight of every step."""
    config = replace(small_config(ROUTERS["token_choice"]), moe=MoEConfig(4, 2))
    model = small_model(own(config, "attention", expert_routers="per_step"))
    requests = [Request(prompt(length, length), 4) for length in (3, 8)]
    for request, served in zip(requests, serve(model, requests, chunk_size=5), strict=True):
        assert_exact(model, request, served)
    counted = count_parameters(ModelShape.from_decoder(model.config))
    assert counted.total == sum(p.numel() for p in model.parameters())
    ids = random_ids(4, 9)
    model.train()(ids, labels=ids).loss.backward()
    weights = [p for n, p in model.named_parameters() if ".attention." in n and ".weights." in n]
    assert len(weights) == 3 * 4
    assert all(weight.grad is not None and weight.grad.any() for weight in weights)


@pytest.mark.parametrize("sublayers", CHOICES)
def test_parameters_are_counted_and_flops_are_those_of_shared_weights(sublayers):
    shared = replace(small_config(block_size=2), **QWEN)
    config = own(shared, *sublayers)
    counted = account(config, 16)
    model = MoRTransformer(config)
    assert counted.parameters.total == sum(p.numel() for p in model.parameters())
    assert counted.training == account(shared, 16).training
    assert counted.kv_bytes() == account(shared, 16).kv_bytes()


def test_a_folder_keeps_the_weights_of_every_step(tmp_path):
    model = small_model(replace(own(small_config(), "attention", "mlp"), **QWEN))
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == model.config
    ids = random_ids(1, 7)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("initialization", ["stepwise", "average", "lower", "upper"])
def test_a_dense_model_that_shares_nothing_remains_what_it_is(initialization):
    dense = small_model(replace(plain_config(8), **QWEN))
    recursion = RecursionConfig(3, share_norms=False, own_per_step=("attention", "mlp"))
    config, weights = recursive_weights(dense.state_dict(), dense.config, recursion, initialization)
    model = MoRTransformer(config)
    model.load_state_dict(dict(weights))
    ids = random_ids(2, 9)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits)


def test_further_steps_take_the_weights_of_the_last_one():
    model = small_model(replace(own(small_config(), "attention"), **QWEN))
    deeper = deepened(model, 2)
    ours, theirs = deeper.state_dict(), model.state_dict()
    place = "recursions.0.layers.layers.0.attention"
    for name in ("query.weights", "query.biases", "output.weights", "key_norm.weights"):
        for step in (2, 3, 4):
            assert torch.equal(ours[f"{place}.{name}.{step}"], theirs[f"{place}.{name}.2"])
    assert deeper(random_ids(1, 5)).depths.unique().tolist() == [5]


def test_skipped_loops_leave_a_gradient_of_zero():
    model = small_model(own(small_config(RandomLoops()), "attention"))
    ids = random_ids(2, 9)
    while (output := model(ids, labels=ids)).depths.max() == 3:
        model.advance([output])
    output.loss.backward()
    last = [p.grad for n, p in model.named_parameters() if ".weights.2" in n]
    assert len(last) == 4
    assert all(gradient is not None and not gradient.any() for gradient in last)


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: RecursionConfig(1, own_per_step=("mlp",)), "own_per_step needs several steps"),
    (lambda: RecursionConfig(2, own_per_step=("mlp", "mlp")), "each once"),
    (lambda: RecursionConfig(2, own_per_step=("experts",)), "must name any of attention, mlp"),
    (
        lambda: RecursionConfig(2, kv_policy="exit_state", own_per_step=("attention",)),
        "kv_policy='exit_state' projects an exited token once",
    ),
    (
        lambda: RecursionConfig(2, kv_policy="recursive_sharing", own_per_step=("attention",)),
        "kv_policy='recursive_sharing' computes keys and values at the first step only",
    ),
    (
        lambda: RecursionConfig(2, own_per_step=("mlp",), relaxation=Relaxation(1)),
        r"projections=\('query', 'key', 'value', 'output'\)",
    ),
    (
        lambda: replace(own(small_config(), "mlp"), moe=MoEConfig(4)),
        "cannot have mlp where the MLP is a mixture of experts",
    ),
    (lambda: published_names(own(small_config(), "mlp")), "own_per_step is set"),
])  # fmt: skip
def test_a_mistake_is_answered_with_what_is_allowed(mistake: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        mistake()
