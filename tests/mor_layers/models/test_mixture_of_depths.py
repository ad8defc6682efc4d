"""Mixture-of-Depths: layers that each let tokens skip them, with anchors that run all tokens between."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    FixedDepth,
    MoRTransformer,
    RandomDepth,
    RecursionConfig,
    StepContext,
    Tokens,
)
from mor_layers.costs import account
from mor_layers.generation import Request, calibrate
from mor_layers.inspection import inspect_text
from mor_layers.weights import load_model, recursive_weights, save_model, unrolled_weights
from mor_megatron.parallel import SEPARATE_LAYERS_RULES, Arrangement, Names, require_rules
from mor_tools.formats import published_names
from mor_vllm.plugin import require_servable
from tests.mor_layers.costs.test_accounting import BATCH, measure
from tests.mor_layers.generation.served import serve
from tests.mor_layers.small_models import (
    HIDDEN_SIZE,
    VOCAB_SIZE,
    gradients,
    plain_config,
    random_ids,
    small_model,
)

CHOICE = ExpertChoice(capacity_factors=(0.4,), alpha=1.0, combine="residual")


def mixed(
    anchor_every: int | None = 2,
    router: ExpertChoice | RandomDepth = CHOICE,
    balance: float | None = None,
) -> DecoderConfig:
    recursion = RecursionConfig(
        1, "middle_sequence", router, anchor_every=anchor_every, depth_balance=balance
    )
    return DecoderConfig(VOCAB_SIZE, HIDDEN_SIZE, 10, 7, num_heads=2, recursion=recursion)


def by_hand(model: MoRTransformer, ids: Tensor, share: float) -> Tensor:
    """Logits, sequence by sequence: which tokens run a layer is a sorted list of positions."""
    config = model.config.effective_recursion
    logits = []
    for sequence in ids:
        tokens = Tokens.whole_sequence(len(sequence), 1)
        state = model.prelude(model.embedding(sequence[:, None]), StepContext(0, tokens))
        chosen_before = [0] * len(sequence)
        for index, block in enumerate(model.recursions):
            if config.anchor_every and (index + 1) % config.anchor_every == 0:
                state = block.layers(state, StepContext(0, tokens))
                chosen_before = [0] * len(sequence)
                continue
            scores = block.router.scorers[0](state)[:, 0, 0]
            weights = scores.sigmoid()
            tau = config.depth_balance or 0.0
            pairs = zip(scores.tolist(), chosen_before, strict=True)
            ranked = [score - tau * before for score, before in pairs]
            count = max(1, int(share * len(sequence)))
            best = sorted(range(len(sequence)), key=lambda i: -ranked[i])
            chosen = sorted(best[:count])
            chosen_before = [b + (i in chosen) for i, b in enumerate(chosen_before)]
            inner = tokens.take(torch.tensor(chosen)[:, None], None)
            output = block.layers(state[chosen], StepContext(0, inner))
            rows = list(state.unbind())
            for place, position in enumerate(chosen):
                change = output[place] - state[position]
                rows[position] = state[position] + weights[position] * change
            state = torch.stack(rows)
        final = model.norm(model.coda(state, StepContext(0, tokens)))
        logits.append(model.output(final)[:, 0])
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("anchor_every", "balance"), [(None, None), (2, None), (3, None), (None, 0.7), (4, 5.0)]
)
def test_layers_by_hand_compute_the_same(anchor_every, balance):
    model, ids = small_model(mixed(anchor_every, balance=balance)), random_ids(2, 9)
    expected = by_hand(model, ids, 0.4)
    expected.square().sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    output = model(ids)
    torch.testing.assert_close(output.logits, expected)
    output.logits.square().sum().backward()
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-4, atol=1e-4)
    routed = 5 - (5 // anchor_every if anchor_every else 0)
    assert output.depths.sum(dim=1).tolist() == [9 * (5 - routed) + 3 * routed] * 2


def test_a_token_that_skips_a_layer_keeps_its_state_bit_for_bit():
    (block, anchor, *_), states = small_model(mixed()).recursions, torch.randn(9, 2, HIDDEN_SIZE)
    output = block(states)
    skipped = output.depths == 0
    assert 0 < skipped.sum() < skipped.numel()
    assert torch.equal(output.hidden[skipped], states[skipped])
    assert (anchor(states).depths == 1).all() and not list(anchor.router.parameters())


@pytest.mark.parametrize("router", [CHOICE, RandomDepth((0.4,))])
def test_parameters_and_flops_are_counted(router):
    config = mixed(2, router)
    model = small_model(config)
    cost, measured = account(config, 11), measure(model, random_ids(BATCH, 11))
    assert BATCH * cost.forward.total == measured.forward
    assert BATCH * cost.training.total == measured.training
    assert cost.parameters.total == sum(p.numel() for p in model.parameters())
    assert [step.tokens for step in cost.steps] == [11, 4, 11, 4, 11, 4, 11]


def test_generation_sees_no_later_token_and_its_router_learns_the_choice():
    model, ids = small_model(mixed()).eval(), random_ids(1, 9)
    whole = model(ids, causal_routing=True).logits
    for length in (1, 4, 8):
        short = model(ids[:, :length], causal_routing=True).logits
        torch.testing.assert_close(short, whole[:, :length])
    generated = [token.item() for token in model.generate(ids, 3)]
    assert generated[0] == whole[0, -1].argmax()
    losses = model.train()(ids, labels=ids).losses
    assert set(losses) == {"sampling_loss"} and losses["sampling_loss"] > 0


def test_balance_over_depth_spreads_the_layers_over_tokens():
    ids, ranges = random_ids(2, 9), []
    for balance in (None, 1e-9, 50.0):
        model = small_model(mixed(None, balance=balance))
        depths = model(ids).depths
        ranges.append((depths.max() - depths.min()).item())
        short = model.eval()(ids[:, :5], causal_routing=True).logits
        torch.testing.assert_close(short, model(ids, causal_routing=True).logits[:, :5])
    assert ranges[0] == ranges[1] > 1 and ranges[2] <= 1


def test_a_folder_keeps_it_and_a_dense_model_becomes_one(tmp_path):
    model, ids = small_model(mixed()), random_ids(1, 7)
    save_model(model, tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model")(ids).logits, model(ids).logits)
    dense = small_model(plain_config(7))
    recursion = RecursionConfig(1, "middle_sequence", CHOICE, anchor_every=2)
    config, weights = recursive_weights(dense.state_dict(), dense.config, recursion, "average")
    model = MoRTransformer(config)
    model.load_state_dict(dict(weights))
    name = "layers.{}.mlp.up.weight"
    for layer in range(5):
        ours = weights[f"recursions.{layer}.layers.{name.format(0)}"]
        theirs = dense.state_dict()[f"recursions.0.layers.{name.format(1 + layer)}"]
        assert torch.equal(ours, theirs)


def refused_one_by_one() -> None:
    arrangement = Arrangement(7, mixed(balance=0.1).recursion, pipeline=2)
    require_rules(arrangement, SEPARATE_LAYERS_RULES, Names())


def test_layers_that_balance_depth_stay_together_up_to_an_anchor():
    def depths(anchor_every: int | None, balance: float | None) -> tuple[int, ...]:
        recursion = RecursionConfig(
            1, "middle_sequence", CHOICE, anchor_every=anchor_every, depth_balance=balance
        )
        return Arrangement(9, recursion).part_depths

    assert depths(3, None) == (1,) * 9
    assert depths(3, 0.1) == (1, 3, 3, 1, 1)
    assert depths(None, 0.1) == (1, 7, 1)


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: RecursionConfig(2, depth_balance=0.1), "needs layers that route by themselves"),
    (lambda: mixed(balance=0.0), "must be above 0 and finite"),
    (lambda: mixed(2, RandomDepth((0.4,)), 0.1), "with ExpertChoice"),
    (refused_one_by_one, "stages send hidden states only"),
    (lambda: RecursionConfig(1, "sequence", CHOICE, anchor_every=1), "must be at least 2"),
    (lambda: RecursionConfig(1, "cycle", CHOICE, anchor_every=2), "needs layers that route"),
    (lambda: RecursionConfig(1, "sequence", FixedDepth(), anchor_every=2), "lets tokens skip"),
    (lambda: RecursionConfig(1, "sequence", ExpertChoice()), "lets every token run every layer"),
    (lambda: RecursionConfig(2, "sequence", ExpertChoice()), "with which each layer routes by itself"),
    (lambda: serve(small_model(mixed()), [Request([1, 2], 1)]), "Use MoRTransformer.generate"),
    (lambda: calibrate(small_model(mixed()), [random_ids(1, 9)]), "each layer has its own"),
    (lambda: inspect_text(small_model(mixed()), random_ids(1, 9)[0], 9), "each layer routes by itself"),
    (lambda: require_servable(mixed()), "do not route by themselves"),
    (lambda: published_names(mixed()), "num_recursions=1 with a router of each layer"),
    (lambda: unrolled_weights({}, mixed()), "no equivalent plain decoder"),
])  # fmt: skip
def test_a_mistake_is_answered_with_what_is_allowed(mistake: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        mistake()
