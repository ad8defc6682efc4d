"""Deltas of single steps: where they start, what they compute, and what they can be turned into."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from mor_layers import (
    ExpertChoice,
    FixedDepth,
    MoEConfig,
    MoRTransformer,
    RecursionConfig,
    Relaxation,
    TokenChoice,
    from_mapping,
    to_mapping,
)
from mor_layers.generation import Request
from mor_layers.layers import RelaxedLinear, merged_weight
from mor_layers.layers.relaxation import PROJECTIONS, StepDelta
from mor_layers.recursion import SHARING_SCHEMES
from mor_layers.weights import INITIALIZATIONS, recursive_weights, unrolled_weights
from mor_layers.weights.uptraining import start_of_delta
from tests.mor_layers.generation.served import assert_exact, prompt, serve
from tests.mor_layers.small_models import (
    HIDDEN_SIZE,
    ROUTERS,
    gradients,
    plain_config,
    random_ids,
    randomized,
    small_config,
    small_model,
)
from tests.pairs import sweep

KINDS = ("lora", "dora")
WITHOUT_KEYS = ("query", "output", "gate", "up", "down")


def relaxed_config(relaxation: Relaxation, **changes: Any):
    config = small_config(**changes)
    assert config.recursion is not None
    return replace(config, recursion=replace(config.recursion, relaxation=relaxation))


def relaxed_model(relaxation: Relaxation, **changes: Any) -> MoRTransformer:
    """Deltas large enough to matter."""
    return small_model(relaxed_config(relaxation, **changes))


def dense_model(sharing: str, **changes: Any) -> MoRTransformer:
    ends = 2 if sharing.startswith("middle") else 0
    return small_model(replace(plain_config(6 + ends), **changes))


def loaded(config, weights) -> MoRTransformer:
    model = MoRTransformer(config)
    model.load_state_dict(dict(weights))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["fixed_depth", "expert_choice", "token_choice"])
def test_a_new_delta_changes_no_bit(kind, router):
    plain = small_model(small_config(ROUTERS[router], block_size=2))
    model = MoRTransformer(
        relaxed_config(Relaxation(3, kind), router=ROUTERS[router], block_size=2)
    )
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected and all(".deltas." in name for name in missing)
    for module in model.modules():
        if isinstance(module, RelaxedLinear):
            module.reset_deltas()
    ids = random_ids(2, 9)
    assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_delta_of_each_projection_at_each_step_gets_a_gradient(kind, projection):
    model = relaxed_model(Relaxation(3, kind, (projection,), 0.5))
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    own = {name: g for name, g in gradients(model).items() if ".deltas." in name}
    assert len(own) == 3 * (2 if kind == "lora" else 3)
    assert all(f".{projection}.deltas." in name and g.abs().max() > 0 for name, g in own.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharing", SHARING_SCHEMES)
def test_merged_into_unrolled_weights_the_model_computes_the_same(kind, sharing):
    model = relaxed_model(Relaxation(3, kind, scale=0.7), sharing=sharing, block_size=2)
    plain = loaded(*unrolled_weights(model.state_dict(), model.config))
    assert plain.config.recursion is None
    ids = random_ids(2, 9)
    expected = model(ids, labels=ids)
    found = plain(ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    expected.loss.backward()
    found.loss.backward()
    torch.testing.assert_close(
        plain.embedding.weight.grad, model.embedding.weight.grad, rtol=1e-4, atol=1e-5
    )


def test_deltas_of_one_projection_leave_the_weights_of_the_others():
    model = relaxed_model(Relaxation(2, projections=("up",)))
    weights = model.state_dict()
    _, plain = unrolled_weights(weights, model.config)
    shared = "recursions.0.layers.layers.0"
    assert torch.equal(
        plain[f"{shared[:-1]}2.mlp.gate.weight"], weights[f"{shared}.mlp.gate.weight"]
    )
    assert not torch.equal(
        plain[f"{shared[:-1]}2.mlp.up.weight"], weights[f"{shared}.mlp.up.weight"]
    )


def test_a_delta_moves_its_own_step_only():
    ids = random_ids(2, 9)
    model = relaxed_model(Relaxation(2))
    states: list[Tensor] = []
    model.recursions[0].layers.register_forward_hook(lambda *call: states.append(call[2]))
    model(ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".deltas.1." in name:
                parameter.mul_(2)
    model(ids)
    first, second, _, same, other, _ = states
    assert torch.equal(first, same)
    assert not torch.equal(second, other)


# Every initialization under two schemes and every scheme with two initializations, a kind each.
AT_FULL_RANK = [
    (initialization, SHARING_SCHEMES[(index + turn) % len(SHARING_SCHEMES)], kind)
    for index, initialization in enumerate(INITIALIZATIONS[:-1])
    for turn, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(
    ("initialization", "sharing", "kind"),
    sweep(product(INITIALIZATIONS[:-1], SHARING_SCHEMES, KINDS), AT_FULL_RANK),
)
def test_at_full_rank_the_dense_model_is_reproduced(kind, sharing, initialization):
    dense = dense_model(sharing)
    relaxation = Relaxation(HIDDEN_SIZE, kind, scale=2.0)
    recursion = RecursionConfig(3, sharing, share_norms=False, relaxation=relaxation)
    model = loaded(*recursive_weights(dense.state_dict(), dense.config, recursion, initialization))
    ids = random_ids(2, 9)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_that_a_delta_leaves_falls_with_its_rank(kind):
    dense = dense_model("middle_cycle").state_dict()
    name = "recursions.0.layers.layers.{}.mlp.up.weight"
    shared, original = dense[name.format(0)], dense[name.format(3)]
    errors = [(original - shared).norm()]
    for rank in range(1, 11):
        relaxation = Relaxation(rank, kind, scale=0.5)
        start = start_of_delta(shared, original, relaxation)
        own = merged_weight(shared, scale=0.5, **start)
        errors.append((original - own).norm())
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-5 < errors[-2]


def test_lower_ranks_of_a_model_come_ever_closer_to_the_dense_one():
    dense = dense_model("middle_cycle")
    ids = random_ids(2, 9)

    def error(relaxation: Relaxation | None) -> Tensor:
        recursion = RecursionConfig(3, share_norms=False, relaxation=relaxation)
        start = recursive_weights(dense.state_dict(), dense.config, recursion, "average")
        return (loaded(*start)(ids).logits - dense(ids).logits).norm()

    none, some, all_but_two, full = (
        error(relaxation)
        for relaxation in (None, Relaxation(4), Relaxation(10), Relaxation(HIDDEN_SIZE))
    )
    assert full < 1e-4 < all_but_two < some < none


def test_deltas_are_made_one_at_a_time_in_the_dtype_of_the_weights():
    dense = dense_model("middle_cycle").bfloat16()
    recursion = RecursionConfig(3, relaxation=Relaxation(2, "dora"))
    read: list[str] = []

    class Watched(dict):
        def __getitem__(self, name: str) -> Tensor:
            read.append(name)
            return super().__getitem__(name)

    config, weights = recursive_weights(
        Watched(dense.state_dict()), dense.config, recursion, "lower"
    )
    assert read == []
    name = "recursions.0.layers.layers.1.attention.key.deltas.2"
    tensors = [weights[f"{name}.{part}"] for part in ("a", "b", "magnitude")]
    # The shared weight, and that of the layer at the depth of step 3: prelude, 2 · 2 layers, 1.
    assert read == [f"recursions.0.layers.layers.{n}.attention.key.weight" for n in (2, 6)]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert set(weights) == set(MoRTransformer(config).state_dict())


def test_random_weights_have_deltas_that_change_nothing():
    dense = dense_model("middle_cycle")
    recursion = RecursionConfig(3, relaxation=Relaxation(2, "dora"))
    start = recursive_weights(dense.state_dict(), dense.config, recursion, "random", seed=3)
    model, plain = loaded(*start), replace(recursion, relaxation=None)
    other = loaded(*recursive_weights(dense.state_dict(), dense.config, plain, "random", seed=3))
    other.load_state_dict({n: t for n, t in model.state_dict().items() if ".deltas." not in n})
    ids = random_ids(2, 9)
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_biases_of_queries_come_after_the_magnitudes():
    dense = dense_model("cycle", qkv_bias=True)
    recursion = RecursionConfig(3, "cycle", relaxation=Relaxation(3, "dora"))
    model = loaded(*recursive_weights(dense.state_dict(), dense.config, recursion, "average"))
    plain = loaded(*unrolled_weights(model.state_dict(), model.config))
    ids = random_ids(2, 9)
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("router", "policy"),
    [
        ("fixed_depth", "recursion_wise"),
        ("expert_choice", "recursion_wise"),
        ("token_choice", "recursion_wise"),
        ("token_choice", "recursive_sharing"),
        ("expert_choice_first_step_too", "sharing_with_update"),
        ("token_choice", "exit_state"),
    ],
)
def test_decoding_equals_the_full_forward_pass(kind, router, policy):
    keyed = policy in ("recursion_wise", "sharing_with_update")
    relaxation = Relaxation(3, kind, PROJECTIONS if keyed else WITHOUT_KEYS)
    model = relaxed_model(relaxation, router=ROUTERS[router], kv_policy=policy, block_size=2)
    requests = [Request(prompt(length, length), 4) for length in (3, 8, 1)]
    for request, served in zip(requests, serve(model, requests, chunk_size=5), strict=True):
        assert_exact(model, request, served)


@pytest.mark.parametrize("sharing", ["sequence", "middle_sequence"])
def test_decoding_of_layers_that_repeat_one_by_one(sharing):
    model = relaxed_model(Relaxation(3), sharing=sharing, block_size=2)
    requests = [Request(prompt(length, length), 4) for length in (2, 7)]
    for request, served in zip(requests, serve(model, requests, chunk_size=4), strict=True):
        assert_exact(model, request, served)


def test_recomputation_gives_the_same_gradients():
    config = relaxed_config(Relaxation(3, "dora"), router=TokenChoice())
    ids, found = random_ids(2, 9), []
    for recompute in (False, True):
        model = small_model(config, recompute=recompute)
        model(ids, labels=ids).loss.backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0])


def test_settings_go_through_plain_mappings():
    config = relaxed_config(Relaxation(4, "dora", ("query", "down"), 0.5))
    assert from_mapping(type(config), to_mapping(config)) == config


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: Relaxation(0), "rank=0 must be at least 1"),
    (lambda: Relaxation(1, "qlora"), "Use one of lora, dora"),
    (lambda: Relaxation(1, projections=()), "must name one or more"),
    (lambda: Relaxation(1, projections=("query", "fc1")), "must name one or more of query"),
    (lambda: Relaxation(1, projections=("query", "query")), "each once"),
    (lambda: Relaxation(1, scale=0.0), "scale=0.0 must be finite"),
    (lambda: RecursionConfig(1, relaxation=Relaxation(1)), "no effect with num_recursions=1"),
    (
        lambda: RecursionConfig(2, kv_policy="exit_state", relaxation=Relaxation(1)),
        r"exit_state.*key and value. Use projections=\('query', 'output', 'gate', 'up', 'down'\)",
    ),
    (
        lambda: RecursionConfig(
            2, kv_policy="recursive_sharing", relaxation=Relaxation(1, projections=("key",))
        ),
        "at the first step only",
    ),
    (
        lambda: replace(relaxed_config(Relaxation(1)), moe=MoEConfig(2, 1)),
        "mixture of experts. Use projections=",
    ),
    (
        lambda: unrolled_weights({}, relaxed_config(Relaxation(1), router=ExpertChoice())),
        "only FixedDepth",
    ),
])  # fmt: skip
def test_a_mistake_is_answered_with_what_is_allowed(mistake: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        mistake()


def test_fixed_depth_is_what_an_unrolled_model_has():
    config = small_config(FixedDepth(), kv_policy="recursive_sharing")
    with pytest.raises(ValueError, match="recursive_sharing"):
        unrolled_weights({}, config)


def test_the_norms_of_a_dora_delta_are_constants_to_the_gradient():
    # As DoRA (arXiv 2402.09353, section 4.3) proposes; the norm's own gradient would be memory for
    # next to nothing.
    relaxation = Relaxation(rank=2, kind="dora", projections=("output",))
    delta = randomized(StepDelta(3, 4, relaxation))
    weight, hidden = torch.randn(4, 3, requires_grad=True), torch.randn(5, 1, 3)
    projected = torch.nn.functional.linear(hidden, weight)
    delta(hidden, projected, weight).sum().backward()
    own = weight + relaxation.scale * delta.b @ delta.a
    scales = delta.magnitude / own.norm(dim=1)
    expected = scales[:, None] * hidden.sum(dim=(0, 1))
    torch.testing.assert_close(weight.grad, expected.detach())
