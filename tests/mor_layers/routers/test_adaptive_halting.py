"""Adaptive computation time as a router: halting, the weighted mean of states, and the ponder cost."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mor_layers import MoRTransformer, RecursionConfig, StepContext, Tokens
from mor_layers.costs import account
from mor_layers.generation import Request, deepened
from mor_layers.recursion import HistoryInjection, HyperConnections
from mor_layers.routers import AdaptiveHalting
from mor_layers.weights import load_model, save_model
from tests.mor_layers.costs.test_accounting import BATCH, measure
from tests.mor_layers.generation.served import assert_exact, prompt, serve
from tests.mor_layers.small_models import gradients, random_ids, small_config, small_model

STEPS = 4


def halting(
    router: AdaptiveHalting | None = None, seed: int = 0, **changes: object
) -> MoRTransformer:
    """A model whose tokens halt at any step."""
    config = small_config(router or AdaptiveHalting(ponder_cost=0.5), STEPS)
    assert config.recursion is not None
    model = small_model(replace(config, recursion=replace(config.recursion, **changes)), seed)
    with torch.no_grad():
        model.recursions[0].router.scorer.bias.fill_(-0.2)
    return model


def by_hand(model: MoRTransformer, ids: Tensor) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Logits, ponder cost and depths: token by token, with a list of each token's probabilities."""
    (block,) = model.recursions
    logits, costs, depths = [], [], []
    for sequence in ids:
        length = len(sequence)
        tokens = Tokens.whole_sequence(length, 1)
        states = list(model.prelude(model.embedding(sequence[:, None]), StepContext(0, tokens)))
        means = [torch.zeros_like(state) for state in states]
        spent: list[Tensor] = [torch.zeros(())] * length
        running, taken = list(range(length)), [0] * length
        for step in range(STEPS):
            now = [torch.sigmoid(block.router.scorer(states[i])[0, 0]) for i in running]
            inner = tokens.take(torch.tensor(running)[:, None], None)
            output = block.layers(
                torch.stack([states[i] for i in running]), StepContext(step, inner)
            )
            going_on = []
            for place, (i, p) in enumerate(zip(running, now, strict=True)):
                taken[i], states[i] = step + 1, output[place]
                if spent[i] + p > 0.99 or step == STEPS - 1:
                    remainder = 1 - spent[i]
                    means[i] = means[i] + remainder * output[place]
                    costs.append(taken[i] + remainder)
                else:
                    means[i], spent[i] = means[i] + p * output[place], spent[i] + p
                    going_on.append(i)
            running = going_on
            if not running:
                break
        final = model.norm(model.coda(torch.stack(means), StepContext(0, tokens)))
        logits.append(model.output(final)[:, 0])
        depths.append(taken)
    return torch.stack(logits), torch.stack(costs).mean(), depths


def test_halting_by_hand_computes_the_same():
    model, ids = halting(), random_ids(3, 7)
    expected, cost, depths = by_hand(model, ids)
    (expected.square().mean() + 0.5 * cost).backward()
    wanted = gradients(model)
    model.zero_grad()
    output = model(ids)
    assert output.depths.tolist() == depths and {2, 3, 4} <= set(output.depths.flatten().tolist())
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.losses["ponder_cost"], 0.5 * cost)
    (output.logits.square().mean() + output.losses["ponder_cost"]).backward()
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-4, atol=1e-5)
    assert wanted["recursions.0.router.scorer.bias"].abs().max() > 0


def test_a_token_that_halts_at_once_is_the_output_of_the_first_step():
    model, ids = halting(AdaptiveHalting(bias=50.0)), random_ids(2, 7)
    with torch.no_grad():
        model.recursions[0].router.scorer.bias.fill_(50.0)
    tokens = Tokens.whole_sequence(*ids.T.shape)
    state = model.prelude(model.embedding(ids.T), StepContext(0, tokens))
    state = model.recursions[0].layers(state, StepContext(0, tokens))
    final = model.output(model.norm(model.coda(state, StepContext(0, tokens)))).transpose(0, 1)
    output = model(ids)
    torch.testing.assert_close(output.logits, final)
    assert output.depths.unique().tolist() == [1]
    assert output.losses["ponder_cost"].item() == pytest.approx(0.01 * (1 + 1))


@pytest.mark.parametrize(
    "policy", ["recursion_wise", "recursive_sharing", "sharing_with_update", "exit_state"]
)
def test_decoding_equals_the_full_forward_pass(policy):
    model = halting(kv_policy=policy, input_injection=True)
    requests = [Request(prompt(length, length), 4) for length in (3, 8, 1)]
    served = serve(model, requests, chunk_size=5)
    assert len({depth for each in served for depth in each.depths}) > 1
    for request, each in zip(requests, served, strict=True):
        assert_exact(model, request, each)


def test_padding_neither_ponders_nor_matters():
    model, ids = halting(), random_ids(2, 7)
    is_padding = torch.zeros(2, 7, dtype=torch.bool)
    is_padding[1, 4:] = True
    output = model(ids, is_padding=is_padding)
    torch.testing.assert_close(output.logits[1, :4], model(ids[1:, :4]).logits[0])
    assert not output.depths[1, 4:].any()


def test_parameters_and_flops_are_counted():
    model = halting()
    measured = measure(model, random_ids(BATCH, 11))
    cost = account(model.config, 11, measured.tokens_per_step)
    assert BATCH * cost.forward.total == measured.forward
    assert cost.parameters.total == sum(p.numel() for p in model.parameters())


def test_a_folder_keeps_it(tmp_path):
    model = halting()
    save_model(model, tmp_path / "model")
    ids = random_ids(1, 7)
    assert torch.equal(load_model(tmp_path / "model")(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: AdaptiveHalting(epsilon=0.0), r"epsilon=0.0 must lie in \(0, 1\)"),
    (lambda: AdaptiveHalting(ponder_cost=-1.0), "ponder_cost=-1.0"),
    (lambda: RecursionConfig(1, router=AdaptiveHalting()), "needs several steps"),
    (
        lambda: RecursionConfig(
            3, router=AdaptiveHalting(), hyper_connections=HyperConnections(2)
        ),
        "both say what a token carries between steps",
    ),
    (
        lambda: RecursionConfig(3, router=AdaptiveHalting(), history=HistoryInjection(1)),
        "both say what a token carries between steps",
    ),
    (lambda: deepened(halting(), 1), "ends every token at its last step"),
])  # fmt: skip
def test_a_mistake_is_answered_with_what_is_allowed(mistake: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        mistake()
