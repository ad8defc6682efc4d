"""RecursionBlock against loops over documents, tokens and steps."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mor_layers import (
    ExpertChoice,
    FixedDepth,
    RandomDepth,
    RecursionBlock,
    RouterConfig,
    RoutingDecision,
    StepContext,
    TokenChoice,
    Tokens,
)
from mor_layers.layers import PointwiseLayers
from mor_layers.models import DecoderStack
from mor_layers.recursion import RoutedStep, begin_step
from tests.mor_layers.selection.test_decision import batches
from tests.mor_layers.small_models import (
    HIDDEN_SIZE,
    KV_POLICIES,
    ROUTERS,
    columns,
    differentiable,
    gradients,
    oracle_gradients,
    random_states,
    randomized,
    small_config,
)
from tests.oracles import loops as reference

NUM_RECURSIONS = 3


@dataclass(frozen=True)
class Layout:
    """Which rows of a batch are padding, and where documents begin."""

    length: int
    batch: int
    documents: Tensor | None = None
    is_padding: Tensor | None = None

    def tokens(self) -> Tokens:
        return Tokens.whole_sequence(
            self.length, self.batch, documents=self.documents, is_padding=self.is_padding
        )


DOCUMENTS = columns([5, 5, 5, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0], [1, 1, 2, 3, 3, 3, 3])
PADDING = columns([1, 0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]).bool()
LAYOUTS = {
    "one_token": Layout(1, 1),
    "one_token_each": Layout(1, 3, torch.zeros(1, 3, dtype=torch.long)),
    "plain": Layout(7, 2),
    "padded": Layout(7, 3, None, PADDING),
    "documents": Layout(7, 3, DOCUMENTS),
    "padded_documents": Layout(7, 3, DOCUMENTS, PADDING),
}


def oracle(
    config: RouterConfig,
    weights: dict[str, Tensor],
    hidden: Tensor,
    block: reference.Block,
    layout: Layout,
    num_recursions: int = NUM_RECURSIONS,
    causal: bool = False,
) -> reference.Recursion:
    """The loops for any router, its weights named as in a RecursionBlock's state dict."""
    where = {"documents": layout.documents, "is_padding": layout.is_padding}
    router = reference.within(weights, "router")
    return reference.route(hidden, block, config, router, num_recursions, causal, where)


def weighted_losses(config: RouterConfig, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The oracle's losses times their coefficients, those that the settings ask for."""
    coefficients = {
        "sampling_loss": getattr(config, "predictor_weight", None),
        "balancing_loss": 0.1 if getattr(config, "balancing", None) == "loss" else None,
        "router_z_loss": getattr(config, "z_loss_coefficient", None) or None,
    }
    return {
        name: coefficients[name] * loss
        for name, loss in losses.items()
        if coefficients[name] is not None
    }


def assert_equals_the_loops(
    config: RouterConfig,
    layout: Layout,
    policy: str = "recursion_wise",
    causal: bool = False,
    num_recursions: int = NUM_RECURSIONS,
) -> None:
    """States, depths, losses and every gradient of a recursion over decoder layers."""
    settings = small_config(block_size=2)
    stack = DecoderStack(settings, 2)
    block = RecursionBlock(stack, config.build(HIDDEN_SIZE, num_recursions), policy)
    randomized(block)
    hidden = random_states(layout.length, layout.batch)
    output = block(hidden, layout.tokens(), causal_routing=causal)

    weights, origin = differentiable(block), hidden.detach().clone().requires_grad_()
    layers = reference.decoder_block(reference.within(weights, "layers"), 2, settings, policy)
    expected = oracle(config, weights, origin, layers, layout, num_recursions, causal)

    assert torch.equal(output.depths, expected.depths)
    close = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(output.hidden, expected.hidden, **close)
    expected_losses = weighted_losses(config, expected.losses)
    assert set(output.losses) == set(expected_losses)
    torch.testing.assert_close(output.losses, expected_losses, **close)

    seed = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
    for states, losses in ((output.hidden, output.losses), (expected.hidden, expected_losses)):
        ((states * seed).sum() / seed.numel() + sum(losses.values())).backward()
    torch.testing.assert_close(hidden.grad, origin.grad, **close)
    torch.testing.assert_close(gradients(block), oracle_gradients(weights), **close)


EVERY_ROUTER = {
    "fixed_depth": FixedDepth(),
    "expert_choice": ExpertChoice(alpha=0.7, z_loss_coefficient=0.01),
    "expert_choice_mlp": ExpertChoice(architecture="mlp", temperature=2.0, activation="tanh"),
    "expert_choice_additive": ExpertChoice(combine="additive", activation="none"),
    "expert_choice_aux_router": ExpertChoice(
        predictor="aux_router", capacity_factors=(0.8, 0.5, 0.3), alpha=1.0
    ),
    "token_choice": TokenChoice(z_loss_coefficient=0.01),
    "token_choice_mlp": TokenChoice(architecture="mlp", temperature=0.5),
    "token_choice_sigmoid": TokenChoice(activation="sigmoid", alpha=0.3, balancing="loss_free"),
    "token_choice_additive": TokenChoice(combine="additive", balancing="none"),
}


@pytest.mark.parametrize("router", EVERY_ROUTER)
def test_every_router_equals_the_loops_with_all_gradients(router):
    assert_equals_the_loops(EVERY_ROUTER[router], LAYOUTS["padded_documents"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_every_layout_of_a_batch_equals_the_loops_with_all_gradients(router, layout):
    assert_equals_the_loops(EVERY_ROUTER[router], LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["plain", "padded_documents"])
@pytest.mark.parametrize("policy", KV_POLICIES[1:])
@pytest.mark.parametrize("router", ["fixed_depth", "expert_choice_aux_router", "token_choice"])
def test_every_kv_policy_equals_the_loops_with_all_gradients(router, policy, layout):
    assert_equals_the_loops(EVERY_ROUTER[router], LAYOUTS[layout], policy)


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("router", ["expert_choice", "expert_choice_aux_router"])
def test_causal_routing_equals_the_loops_with_all_gradients(router, policy):
    assert_equals_the_loops(EVERY_ROUTER[router], LAYOUTS["padded_documents"], policy, causal=True)


@pytest.mark.parametrize("layout", ["plain", "padded_documents"])
def test_mixture_of_depths_is_one_recursion_with_a_smaller_capacity(layout):
    config = ExpertChoice(capacity_factors=(0.5,), alpha=1.0)
    assert_equals_the_loops(config, LAYOUTS[layout], num_recursions=1)
    block = RecursionBlock(PointwiseLayers(nn.Tanh()), config.build(HIDDEN_SIZE, 1))
    assert block(random_states(8, 2)).depths.sum(dim=0).tolist() == [4, 4]


class Bomb(nn.Module):
    """Layers that change every state they are given beyond recognition."""

    def forward(self, hidden: Tensor, context: StepContext) -> Tensor:
        return 1e4 * hidden + 7


@given(
    tokens=batches(),
    router=st.sampled_from(sorted(ROUTERS)),
    causal=st.booleans(),
    seed=st.integers(0, 100),
)
def test_tokens_that_do_not_run_are_bitwise_unchanged(tokens, router, causal, seed):
    block = RecursionBlock(Bomb(), ROUTERS[router].build(HIDDEN_SIZE, NUM_RECURSIONS))
    randomized(block, seed)
    torch.manual_seed(seed)
    hidden = random_states(*tokens.shape, seed=seed)
    output = block(hidden, tokens, causal_routing=causal)
    idle = output.depths == 0
    assert torch.equal(output.hidden[idle], hidden[idle])
    if (~idle).any():
        assert (output.hidden[~idle] != hidden[~idle]).any(dim=-1).all()
    if tokens.is_padding is not None:
        assert idle[tokens.is_padding].all()


@given(
    tokens=batches(max_length=7),
    router=st.sampled_from(["fixed_depth", "expert_choice", "expert_choice_first_step_too"]),
    seed=st.integers(0, 100),
)
def test_shares_of_every_document_are_what_the_settings_say(tokens, router, seed):
    config = ROUTERS[router]
    block = RecursionBlock(Bomb(), randomized(config.build(HIDDEN_SIZE, NUM_RECURSIONS), seed))
    depths = block(random_states(*tokens.shape, seed=seed), tokens).depths
    factors = config.capacity_factors_for(NUM_RECURSIONS)
    for document in reference.split_documents(*tokens.shape, tokens.documents, tokens.is_padding):
        own = [int(depths[p, document.sequence]) for p in document.positions]
        for step, factor in enumerate(factors):
            expected = max(1, int(factor * len(own)))
            assert sum(depth > step for depth in own) == expected


def some_decoder_block(
    config: RouterConfig, policy: str = "recursion_wise", recompute: bool = False
) -> RecursionBlock:
    stack = DecoderStack(small_config(block_size=2), 2)
    router = config.build(HIDDEN_SIZE, NUM_RECURSIONS)
    return randomized(RecursionBlock(stack, router, policy, recompute=recompute))


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_recomputing_activations_changes_nothing(router, policy):
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        block = some_decoder_block(ROUTERS[router], policy, recompute)
        hidden = random_states(7, 3)
        output = block(hidden, LAYOUTS["padded_documents"].tokens())
        loss = output.hidden.square().mean() + sum(output.losses.values())
        loss.backward(retain_graph=True)
        first = gradients(block)
        loss.backward()  # a second time, on what the first one recomputed
        second = gradients(block)
        torch.testing.assert_close(second, {name: 2 * grad for name, grad in first.items()})
        assert any(grad.any() for grad in first.values())
        results.append((output.hidden, output.losses, hidden.grad, first, output.depths))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_recomputing_runs_the_layers_twice_but_routes_once():
    block, calls = some_decoder_block(ROUTERS["expert_choice"], recompute=True), []
    block.layers.layers[0].attention.query.register_forward_hook(lambda *_: calls.append("layers"))
    block.router.scorers[0].register_forward_hook(lambda *_: calls.append("router"))
    block(random_states(5, 1)).hidden.sum().backward()
    assert (calls.count("layers"), calls.count("router")) == (2 * NUM_RECURSIONS, 1)


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_one_recursion_of_fixed_depth_is_the_plain_stack(policy):
    block = some_decoder_block(FixedDepth(), policy)
    block.router = FixedDepth().build(HIDDEN_SIZE, 1)
    hidden = random_states(6, 2)
    tokens = Tokens.whole_sequence(6, 2)
    plain = block.layers(hidden, StepContext(0, tokens))
    assert torch.equal(block(hidden, tokens).hidden, plain)


@pytest.mark.parametrize("router", ["fixed_depth", "expert_choice", "random_depth", "token_choice"])
def test_a_step_of_everything_neither_sorts_nor_gathers(router):
    decision = some_decoder_block(ROUTERS[router])(random_states(6, 2)).decisions[0]
    assert decision.rows is None
    assert decision.tokens.is_plain


def test_fixed_depth_never_sorts_nor_gathers():
    output = some_decoder_block(FixedDepth())(random_states(6, 2))
    assert [decision.rows for decision in output.decisions] == [None] * NUM_RECURSIONS


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_steps_that_nobody_runs_do_no_harm(policy):
    block = some_decoder_block(TokenChoice(balancing="loss_free"), policy)
    block.router.depth_bias.copy_(torch.tensor([100.0, 0.0, 0.0]))
    hidden = random_states(5, 2)
    output = block(hidden)
    assert (output.depths == 1).all()
    assert [int(d.tokens.count) for d in output.decisions] == [10, 0, 0]
    output.hidden.sum().backward()
    assert hidden.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_batch_of_nothing_but_padding_passes_through(router, policy):
    tokens = Tokens.whole_sequence(4, 2, is_padding=torch.ones(4, 2, dtype=torch.bool))
    block, hidden = some_decoder_block(ROUTERS[router], policy), random_states(4, 2)
    output = block(hidden, tokens)
    assert torch.equal(output.hidden, hidden)
    assert not output.depths.any()
    (output.hidden.sum() + sum(output.losses.values())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())
    assert all(loss.item() == 0.0 for loss in output.losses.values())


def test_depths_and_counts_agree_with_the_decisions():
    block = some_decoder_block(ROUTERS["token_choice"])
    output = block(random_states(7, 3), LAYOUTS["padded"].tokens())
    counts = [int(decision.tokens.count) for decision in output.decisions]
    assert counts == [int((output.depths > step).sum()) for step in range(NUM_RECURSIONS)]
    assert counts[0] == int((~PADDING).sum())
    assert not output.depths[PADDING].any()


def test_arguments_reach_the_layers_also_when_recomputing():
    class Scaled(nn.Module):
        def forward(self, hidden: Tensor, context: StepContext, scale: float) -> Tensor:
            return hidden * scale

    for recompute in (False, True):
        block = RecursionBlock(Scaled(), FixedDepth().build(2, 2), recompute=recompute)
        hidden = random_states(3, 1, 2)
        assert torch.equal(block(hidden, scale=2.0).hidden, hidden * 4)


def test_random_depth_follows_torchs_seed():
    block = some_decoder_block(RandomDepth())
    torch.manual_seed(3)
    first = block(random_states(9, 2)).depths
    torch.manual_seed(3)
    assert torch.equal(block(random_states(9, 2)).depths, first)


def test_the_wrapped_layers_are_stored_once():
    block = some_decoder_block(ROUTERS["expert_choice"])
    layers = {name for name in block.state_dict() if name.startswith("layers.")}
    assert layers == {f"layers.{name}" for name in block.layers.state_dict()}


@pytest.mark.parametrize("assess", [True, False])
def test_an_observer_sees_every_step_that_is_routed(assess):
    block = some_decoder_block(ROUTERS["expert_choice"])
    hidden, tokens = random_states(9, 2), Tokens.whole_sequence(9, 2)
    plain, seen = block(hidden), []
    with block.observed(seen.append):
        output = block(hidden)
        block.route(hidden, 0, RoutingDecision.everything(tokens), causal=True, assess=assess)
    assert torch.equal(output.hidden, plain.hidden)
    found = [(routed.step, routed.causal) for routed in seen]
    assert found == [(0, False), (1, False), (2, False), (0, True)]
    for routed, decision in zip(seen, output.decisions, strict=False):
        assert routed.decision is decision
        assert routed.logits.shape[:2] == routed.previous.tokens.shape
    assert seen[2].previous is seen[1].decision
    assert bool(seen[3].decision.losses) == assess


def test_observers_are_told_of_nothing_once_they_have_left():
    block = some_decoder_block(ROUTERS["token_choice"])
    hidden, outer, inner = random_states(5, 1), [], []

    def refuse(routed: RoutedStep) -> None:
        inner.append(routed)
        raise ZeroDivisionError

    with block.observed(outer.append):
        with pytest.raises(ZeroDivisionError), block.observed(refuse):
            block(hidden)
        block(hidden)
    block(hidden)
    assert [routed.step for routed in outer] == [0, 0, 1, 2]
    assert [routed.step for routed in inner] == [0]


def test_the_parts_of_a_step_make_the_whole():
    block = some_decoder_block(ROUTERS["expert_choice"], policy="recursive_sharing")
    candidates = random_states(9, 2)
    whole, decision = block(candidates), RoutingDecision.everything(Tokens.whole_sequence(9, 2))
    context, steps = None, []
    for step in range(NUM_RECURSIONS):
        decision = block.route(candidates, step, decision)
        selected = block.select(candidates, decision)
        context = begin_step(block.kv_policy, step, decision.tokens, context)
        output = block.run_layers(block.enter(step, selected, None), context)
        steps.append((candidates, decision))
        candidates = block.combine(step, selected, output, decision, None)
    for outer, nested in reversed(steps):
        candidates = block.placement.write_back(outer, candidates, nested)
    assert torch.equal(candidates, whole.hidden)
