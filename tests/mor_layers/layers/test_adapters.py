"""Plain PyTorch modules as the layers of a recursion."""

import pytest
import torch
from torch import Tensor, nn

from mor_layers import (
    ExpertChoice,
    FixedDepth,
    RecursionBlock,
    RouterConfig,
    StepContext,
    TokenChoice,
)
from mor_layers.layers import EncoderLayers, PointwiseLayers
from mor_layers.models import DecoderStack
from tests.mor_layers.recursion.test_block import LAYOUTS, NUM_RECURSIONS, oracle
from tests.mor_layers.small_models import (
    HIDDEN_SIZE,
    differentiable,
    gradients,
    oracle_gradients,
    random_states,
    randomized,
    small_config,
)
from tests.oracles import loops as reference

ADAPTIVE: dict[str, RouterConfig] = {
    "fixed_depth": FixedDepth(),
    "expert_choice": ExpertChoice(alpha=0.7, capacity_factors=(0.9, 0.6, 0.3)),
    "token_choice": TokenChoice(balancing="none"),
}


class Residual(nn.Module):
    """A plain module that knows nothing of recursion."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.inner(hidden).tanh()


def encoder_layer(batch_first: bool = False) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        HIDDEN_SIZE, nhead=2, dim_feedforward=10, dropout=0.0, batch_first=batch_first
    )


@pytest.mark.parametrize("layout", ["one_token", "plain", "padded_documents"])
@pytest.mark.parametrize("router", ADAPTIVE)
def test_a_pointwise_module_equals_the_loops(router, layout):
    module, layout = Residual(), LAYOUTS[layout]
    layers = PointwiseLayers(module)
    block = RecursionBlock(layers, ADAPTIVE[router].build(HIDDEN_SIZE, NUM_RECURSIONS))
    randomized(block)
    hidden = random_states(layout.length, layout.batch)
    output = block(hidden, layout.tokens())
    expected = oracle(
        ADAPTIVE[router],
        block.state_dict(),
        hidden,
        lambda step, states, positions, memory: torch.stack([module(token) for token in states]),
        layout,
    )
    assert torch.equal(output.depths, expected.depths)
    torch.testing.assert_close(output.hidden, expected.hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layout", ["one_token_each", "plain", "padded", "padded_documents"])
@pytest.mark.parametrize("router", ADAPTIVE)
def test_a_bidirectional_encoder_equals_running_it_on_each_document_alone(
    router, layout, batch_first
):
    layers, layout = [encoder_layer(batch_first), encoder_layer(batch_first)], LAYOUTS[layout]
    block = RecursionBlock(
        EncoderLayers(layers), ADAPTIVE[router].build(HIDDEN_SIZE, NUM_RECURSIONS)
    )
    randomized(block)
    hidden = random_states(layout.length, layout.batch)
    output = block(hidden, layout.tokens())

    weights, origin = differentiable(block), hidden.detach().clone().requires_grad_()

    def alone(step: int, states: Tensor, positions: list[int], memory: object) -> Tensor:
        dim = 0 if batch_first else 1
        states = states.unsqueeze(dim)
        for i, layer in enumerate(layers):
            own = reference.within(weights, f"layers.layers.{i}")
            states = torch.func.functional_call(layer, own, (states,))
        return states.squeeze(dim)

    expected = oracle(ADAPTIVE[router], weights, origin, alone, layout)
    assert torch.equal(output.depths, expected.depths)
    torch.testing.assert_close(output.hidden, expected.hidden, rtol=1e-5, atol=2e-5)
    seed = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5)) / hidden.numel()
    for states in (output.hidden, expected.hidden):
        (states * seed).sum().backward()
    torch.testing.assert_close(hidden.grad, origin.grad, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(gradients(block), oracle_gradients(weights), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("layout", ["padded", "padded_documents"])
def test_no_token_of_an_encoder_is_left_without_a_key(layout):
    layout, layer = LAYOUTS[layout], encoder_layer()
    hidden_from = []
    layer.register_forward_pre_hook(
        lambda _, __, options: hidden_from.append(options), with_kwargs=True
    )
    tokens = layout.tokens()
    EncoderLayers([layer])(random_states(*tokens.shape), StepContext(0, tokens))
    keys, pairs = hidden_from[0]["src_key_padding_mask"], hidden_from[0]["src_mask"]
    if layout.documents is None:
        assert not keys.all(dim=1).any()
    else:
        assert pairs.shape == (2 * layout.batch, layout.length, layout.length)
        assert not pairs.all(dim=2).any()


def test_an_encoder_gives_the_same_while_evaluating():
    block = RecursionBlock(
        EncoderLayers([encoder_layer(batch_first=True)]), FixedDepth().build(HIDDEN_SIZE, 2)
    )
    hidden, tokens = random_states(7, 3), LAYOUTS["padded_documents"].tokens()
    trained = block(hidden, tokens).hidden.detach()
    with torch.no_grad():
        evaluated = block.eval()(hidden, tokens).hidden
    torch.testing.assert_close(evaluated, trained, rtol=1e-5, atol=1e-5)


def test_an_encoder_lets_later_tokens_change_earlier_ones_and_a_decoder_does_not():
    changed = random_states(5, 1).detach()
    changed[-1] += 1
    for layers, causal in (
        (EncoderLayers([encoder_layer()]), False),
        (DecoderStack(small_config(), 1), True),
        (PointwiseLayers(Residual()), True),
    ):
        block = randomized(RecursionBlock(layers, FixedDepth().build(HIDDEN_SIZE, 2)))
        before, after = (block(states).hidden[:-1] for states in (random_states(5, 1), changed))
        assert torch.allclose(before, after) == causal


@pytest.mark.parametrize("policy", ["recursive_sharing", "sharing_with_update"])
@pytest.mark.parametrize("layers", [PointwiseLayers(nn.Tanh()), EncoderLayers([encoder_layer()])])
def test_layers_that_cannot_share_keys_refuse_to(layers, policy):
    block = RecursionBlock(layers, FixedDepth().build(HIDDEN_SIZE, 2), policy)
    with pytest.raises(ValueError, match=r"cannot share keys.*Use kv_policy='recursion_wise'"):
        block(random_states(3, 1))
