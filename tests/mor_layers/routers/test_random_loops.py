"""Random numbers of loops: how they are drawn, curricula, and gradients through the last steps only."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mor_layers import MoRTransformer, RandomLoops, RecursionConfig, Relaxation, StepContext, Tokens
from mor_layers.costs import account
from mor_layers.recursion import HyperConnections, LoopLoss
from mor_layers.routers.loops.random_loops import RandomLoopsRouter
from tests.mor_layers.costs.test_accounting import BATCH, measure
from tests.mor_layers.small_models import gradients, random_ids, small_config, small_model

POISSON = RandomLoops(draw="log_normal_poisson", mean=3.0)


def looped(router: RandomLoops, steps: int = 5, **changes: object) -> MoRTransformer:
    recursion = RecursionConfig(steps, router=router, input_injection=True, **changes)  # type: ignore[arg-type]
    return small_model(replace(small_config(num_recursions=steps), recursion=recursion))


def loops(model: MoRTransformer) -> int:
    router = model.recursions[0].router
    assert isinstance(router, RandomLoopsRouter)
    return router.num_loops


@pytest.mark.parametrize("router", [POISSON, replace(POISSON, min_recursions=3), RandomLoops(2)])
def test_numbers_are_drawn_as_often_as_their_probabilities_say(router):
    count = 4000
    found = Counter(router.drawn(8, step) for step in range(count))
    for number, expected in enumerate(router.probabilities(8, 8)):
        error = (expected * (1 - expected) / count) ** 0.5
        assert abs(found[number] / count - expected) <= 4 * error + 1e-3, number
    assert sum(router.probabilities(8, 8)) == pytest.approx(1)


def test_the_mean_of_the_poisson_distribution_is_the_one_given():
    drawn = POISSON.probabilities(60, 60)
    assert sum(n * p for n, p in enumerate(drawn)) == pytest.approx(3.0 + 1, abs=0.01)


def test_a_curriculum_lets_the_largest_number_grow():
    router = RandomLoops(2, draw="largest", curriculum_steps=10)
    drawn = [router.drawn(6, step) for step in range(14)]
    assert drawn == [2, 2, 2, 3, 3, 4, 4, 4, 5, 5, 6, 6, 6, 6]
    assert router.capacity_factors_at(6, 3) == (1, 1, 1, 0, 0, 0)
    assert router.capacity_factors_for(6) == (1,) * 6
    uniform = RandomLoops(draw="uniform", curriculum_steps=100)
    assert {uniform.drawn(6, step) for step in range(20)} == {1}
    assert max(uniform.drawn(6, step) for step in range(100, 300)) == 6
    model = looped(RandomLoops(draw="largest", curriculum_steps=4))
    depths = []
    for _ in range(6):
        output = model(random_ids(1, 4))
        depths += output.depths.unique().tolist()
        model.advance([output])
    assert depths == [1, 2, 3, 4, 5, 5]


def by_hand(model: MoRTransformer, ids: torch.Tensor, count: int, last: int) -> torch.Tensor:
    """Logits after `count` loops, the states detached before the `last` ones."""
    (block,), tokens = model.recursions, Tokens.whole_sequence(*ids.T.shape)
    state = entered = model.prelude(model.embedding(ids.T), StepContext(0, tokens))
    for step in range(count):
        if step == count - last:
            state = state.detach()
        state = block.layers(block.step_input(step, state, entered), StepContext(step, tokens))
    return model.output(model.norm(model.coda(state, StepContext(0, tokens)))).transpose(0, 1)


@pytest.mark.parametrize("last", [1, 2, 4])
def test_gradients_go_through_the_last_steps_only(last):
    model, ids = looped(RandomLoops(draw="largest", backward_steps=last)), random_ids(2, 7)
    expected = by_hand(model, ids, 5, last)
    expected.square().sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-4, atol=1e-4)
    whole = looped(RandomLoops())
    whole.load_state_dict(model.state_dict())
    by_hand(whole, ids, 5, 5).square().sum().backward()
    name = "recursions.0.layers.layers.0.mlp.up.weight"
    assert not torch.allclose(gradients(whole)[name], wanted[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"relaxation": Relaxation(2), "share_norms": False, "step_embeddings": True},
        {"hyper_connections": HyperConnections(2), "kv_policy": "sharing_with_update"},
    ],
)
def test_weights_of_steps_without_gradients_get_zeros(changes):
    model = looped(RandomLoops(draw="largest", backward_steps=2), **changes)
    assert loops(model) == 5
    model(random_ids(2, 7), labels=random_ids(2, 7)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        early = any(f".{kind}.0" in name for kind in ("embeddings", "mixers", "deltas"))
        if early and "recursions" in name:
            assert not parameter.grad.any(), name


def test_steps_without_gradients_keep_no_activations():
    kept = []
    for router in (RandomLoops(), RandomLoops(backward_steps=1)):
        model, size = looped(router), 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += tensor.numel()
            return tensor

        while loops(model) != 5:
            model.advance([model(random_ids(1, 4))])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(random_ids(2, 64), labels=random_ids(2, 64))
        kept.append(size)
    assert kept[1] < 0.6 * kept[0]


def test_accounting_counts_the_steps_that_gradients_go_through():
    router = RandomLoops(draw="largest", backward_steps=2)
    model = looped(router)
    cost, measured = account(model.config, 11), measure(model, random_ids(BATCH, 11))
    assert BATCH * cost.forward.total == measured.forward
    # Not counted: what the first of these steps leaves out, the gradient of its input.
    assert BATCH * cost.training.total == pytest.approx(measured.training, rel=0.05)
    assert [step.trained for step in cost.steps] == [1, 0, 0, 0, 1, 1, 1]
    assert RandomLoops(backward_steps=2).trained_shares_for(4) == pytest.approx(
        (2 / 4, 2 / 3, 1, 1)
    )
    assert router.trained_shares_for(5) == (0, 0, 0, 1, 1)


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: RandomLoops(draw="log_normal_poisson"), "log_normal_poisson needs a mean"),
    (lambda: RandomLoops(mean=2.0), "the others have none"),
    (lambda: RandomLoops(draw="log_normal_poisson", mean=0.0), r"must lie in \(0, 1000\]"),
    (lambda: RandomLoops(draw="normal"), "RandomLoops.draw='normal' is unknown"),
    (lambda: RandomLoops(draw="largest"), "draws nothing. Use FixedDepth"),
    (lambda: RandomLoops(curriculum_steps=-1), "curriculum_steps=-1"),
    (lambda: RandomLoops(backward_steps=0), "must be at least 1, or None for all"),
    (
        lambda: RecursionConfig(3, router=RandomLoops(backward_steps=3), input_injection=True),
        "backward_steps=3 must be below num_recursions=3",
    ),
    (lambda: RecursionConfig(3, router=RandomLoops(backward_steps=2)), "Use input_injection=True"),
    (
        lambda: RecursionConfig(
            3,
            router=RandomLoops(backward_steps=2),
            input_injection=True,
            kv_policy="recursive_sharing",
        ),
        "so they would not learn",
    ),
    (
        lambda: RecursionConfig(
            3, router=RandomLoops(backward_steps=2), input_injection=True, loop_loss=LoopLoss()
        ),
        "loop_loss reads the states of all of them",
    ),
])  # fmt: skip
def test_a_mistake_is_answered_with_what_is_allowed(mistake: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        mistake()
