"""The exit-state policy: later steps see tokens that exited, by the state they kept."""

import pytest
import torch
from torch import Tensor

from mor_layers import (
    ExpertChoice,
    FixedDepth,
    RandomDepth,
    RecursionBlock,
    RecursionConfig,
    RouterConfig,
    TokenChoice,
    Tokens,
)
from mor_layers.models import DecoderStack
from tests.mor_layers.small_models import (
    ROUTERS,
    columns,
    differentiable,
    gradients,
    oracle_gradients,
    random_ids,
    random_states,
    randomized,
    small_config,
    small_model,
)
from tests.oracles import loops as reference
from tests.oracles.exit_state import exit_state, planned

LENGTH, STEPS = 7, 3
DOCUMENTS = columns([0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1])
PADDING = columns([0, 0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0]).bool()
LAYOUTS: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "documents": {"documents": DOCUMENTS},
    "padding": {"is_padding": PADDING},
    "both": {"documents": DOCUMENTS, "is_padding": PADDING},
}


def block_of(router: RouterConfig, num_layers: int = 2, recompute: bool = False) -> RecursionBlock:
    config = small_config()
    block = RecursionBlock(
        DecoderStack(config, num_layers),
        router.build(config.hidden_size, STEPS),
        "exit_state",
        recompute=recompute,
    )
    return randomized(block)


def assert_equals_oracle(
    block: RecursionBlock, settings: RouterConfig, where: dict[str, Tensor], causal: bool = False
) -> None:
    hidden = random_states(LENGTH, 2)
    tokens = Tokens.whole_sequence(LENGTH, 2, **where)
    torch.manual_seed(0)
    output = block(hidden, tokens, causal)
    weights = differentiable(block)
    inputs = hidden.detach().clone().requires_grad_()
    layers = {n.removeprefix("layers."): w for n, w in weights.items() if n.startswith("layers.")}
    router = {n.removeprefix("router."): w for n, w in weights.items() if n.startswith("router.")}
    sequence = iter(range(10**9))

    def run(states: Tensor, oracle: reference.Block, own: dict[str, Tensor | None]):
        if isinstance(settings, RandomDepth):  # the depths that were drawn
            j = next(sequence) // (STEPS + 1)
            return planned(states, oracle, output.depths[:, j], own)
        return reference.route(states, oracle, settings, router, STEPS, causal, own)

    expected = exit_state(
        inputs, run, layers, len(block.layers.layers), small_config(), STEPS, **where
    )
    assert torch.equal(output.depths, expected.depths)
    torch.testing.assert_close(output.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
    seed = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (output.hidden * seed).sum().backward()
    (expected.hidden * seed).sum().backward()
    torch.testing.assert_close(hidden.grad, inputs.grad, rtol=1e-4, atol=1e-4)
    wanted = oracle_gradients(weights)
    for name, gradient in gradients(block).items():
        torch.testing.assert_close(
            gradient, wanted[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


SAMPLE = [("expert_choice_first_step_too", "both"), ("token_choice", "plain"),
          ("random_depth", "padding"), ("expert_choice", "documents")]  # fmt: skip


@pytest.mark.parametrize(
    ("router", "layout"),
    [
        pytest.param(r, w, marks=[] if (r, w) in SAMPLE else [pytest.mark.full])
        for r in ROUTERS
        for w in LAYOUTS
    ],
)
def test_exited_tokens_are_seen_by_the_state_they_kept(router: str, layout: str) -> None:
    assert_equals_oracle(block_of(ROUTERS[router]), ROUTERS[router], LAYOUTS[layout])


def test_it_holds_where_each_token_is_chosen_on_its_own() -> None:
    router = ExpertChoice(capacity_factors=(0.9, 0.5, 0.3), threshold=0.45)
    assert_equals_oracle(block_of(router), router, LAYOUTS["documents"], causal=True)


@pytest.mark.parametrize("name", ["expert_choice_first_step_too", "token_choice"])
def test_recomputation_gives_the_same_gradients(name: str) -> None:
    outcomes = []
    for recompute in (False, True):
        block = block_of(ROUTERS[name], recompute=recompute)
        hidden = random_states(LENGTH, 2)
        block(
            hidden, Tokens.whole_sequence(LENGTH, 2, **LAYOUTS["both"])
        ).hidden.square().sum().backward()
        outcomes.append(gradients(block) | {"input": hidden.grad})
    for key, gradient in outcomes[0].items():
        torch.testing.assert_close(gradient, outcomes[1][key], rtol=1e-6, atol=1e-6)


def test_a_step_sees_every_position_up_to_its_own() -> None:
    block = block_of(ExpertChoice(capacity_factors=(0.8, 0.5, 0.3)))
    masks = []
    block.layers.register_forward_pre_hook(lambda _, args: masks.append(args[1].causal_mask))
    tokens = block(random_states(10, 2)).decisions
    for mask, decision in zip(masks, tokens, strict=True):
        positions = decision.tokens.positions
        assert torch.equal(mask[:, 0].sum(dim=-1), positions.T + 1)


def test_an_exited_token_is_projected_once() -> None:
    block = block_of(ExpertChoice(capacity_factors=(1.0, 0.5, 0.25)))
    rows: list[int] = []
    block.layers.layers[0].attention.key.register_forward_hook(
        lambda _, args, __: rows.append(args[0].shape[0])
    )
    block(random_states(8, 2))
    assert rows == [8, 4 + 4, 2 + 2]


def test_without_exits_it_is_recursion_wise() -> None:
    models = [
        small_model(small_config(FixedDepth(), kv_policy=policy))
        for policy in ("recursion_wise", "exit_state")
    ]
    ids = random_ids(2, 9)
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_no_token_sees_its_future() -> None:
    model = small_model(small_config(TokenChoice(), kv_policy="exit_state"))
    ids = random_ids(2, 12)
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 17
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_a_layer_that_forgets_the_exited_tokens_is_told_so() -> None:
    class Forgetful(torch.nn.Module):
        def forward(self, hidden, context):
            key = hidden[..., None, :]
            context.exchange(0, key, key)
            return hidden

    router = ExpertChoice(capacity_factors=(1.0, 0.5, 0.25)).build(12, STEPS)
    with pytest.raises(ValueError, match="with_exited"):
        RecursionBlock(Forgetful(), router, "exit_state")(random_states(8, 2))


def test_norms_of_each_step_are_refused() -> None:
    with pytest.raises(ValueError, match="share_norms=True"):
        RecursionConfig(3, kv_policy="exit_state", share_norms=False)
