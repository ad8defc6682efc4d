"""A loss after every loop under a fixed prior over depths, and a penalty on the state's scale."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mor_layers import DecoderConfig, MoRTransformer, RandomLoops, RecursionConfig
from mor_layers.generation import Request, with_early_exit
from mor_layers.recursion import LoopLoss
from mor_layers.routers import Confidence
from mor_layers.weights import load_model, save_model
from tests.mor_layers.generation.served import serve
from tests.mor_layers.small_models import (
    ROUTERS,
    gradients,
    random_ids,
    small_config,
    small_model,
)

POISSON = LoopLoss("poisson", 2.0, scale_penalty=0.3)


def with_loss(config: DecoderConfig, loop_loss: LoopLoss | None) -> DecoderConfig:
    assert config.recursion is not None
    return replace(config, recursion=replace(config.recursion, loop_loss=loop_loss))


def shallower(model: MoRTransformer, loops: int) -> MoRTransformer:
    """The model that stops after so many loops, with the same parameters; it has no loop loss."""
    size = model.config.schedule.block_size
    config = small_config(num_recursions=loops, block_size=size)
    made = MoRTransformer(config)
    state = model.state_dict(keep_vars=True)
    made.load_state_dict(state, assign=True)
    return made


def test_priors_are_those_of_their_names():
    assert LoopLoss().weights(4) == (0.25,) * 4
    geometric = [0.3, 0.7 * 0.3, 0.49 * 0.3]
    expected = [p / sum(geometric) for p in geometric]
    assert LoopLoss("geometric", 0.3).weights(3) == pytest.approx(expected)
    poisson = [2.5**r / math.factorial(r) for r in (1, 2, 3)]
    expected = [p / sum(poisson) for p in poisson]
    assert LoopLoss("poisson", 2.5).weights(3) == pytest.approx(expected)
    assert sum(LoopLoss("poisson", 900.0).weights(1000)) == pytest.approx(1)
    assert LoopLoss("geometric", 1e-9).weights(2) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("loop_loss", [LoopLoss(), POISSON])
def test_it_is_the_weighted_loss_of_models_that_stop_after_each_loop(loop_loss):
    model = small_model(with_loss(small_config(block_size=2), loop_loss))
    ids = random_ids(2, 9)
    labels = ids.roll(-1, 1)
    labels[0, 3:5] = -100
    models = [shallower(model, loops) for loops in (1, 2, 3)]
    total, squares = torch.zeros(()), []
    for weight, stopped in zip(loop_loss.weights(3), models, strict=True):
        output = stopped(ids, labels=labels)
        total = total + weight * output.lm_loss
        squares.append(output.recursions[0].hidden.square().mean())
    total.backward(retain_graph=True)
    without_penalty = total.detach()
    penalty = loop_loss.scale_penalty * sum(squares) / 3
    if loop_loss.scale_penalty:
        penalty.backward()
    expected = gradients(model)
    model.zero_grad()
    output = model(ids, labels=labels)
    torch.testing.assert_close(output.lm_loss, without_penalty)
    torch.testing.assert_close(output.loss, without_penalty + penalty)
    output.loss.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.logits, models[-1](ids).logits)


@pytest.mark.parametrize("router", ["expert_choice", "token_choice", "random_depth"])
def test_tokens_that_exited_keep_their_state_after_later_loops(router):
    """Unweighted by steps: read every state out by hand."""
    torch.manual_seed(3)
    model = small_model(with_loss(small_config(ROUTERS[router]), LoopLoss("geometric", 0.4)))
    ids, labels = random_ids(2, 9), random_ids(2, 9, seed=1)
    torch.manual_seed(5)
    output = model(ids, labels=labels)
    (run,) = output.recursions
    assert torch.equal(run.states[-1], run.hidden)
    from mor_layers import StepContext, Tokens

    losses = []
    for step, state in enumerate(run.states):
        final = model.norm(model.coda(state, StepContext(0, Tokens.whole_sequence(9, 2))))
        losses.append(F.cross_entropy(model.output(final).transpose(0, 1).mT, labels))
        if step:
            stayed = run.depths <= step
            assert torch.equal(state[stayed], run.states[step - 1][stayed])
    weights = torch.tensor(LoopLoss("geometric", 0.4).weights(3))
    torch.testing.assert_close(output.lm_loss, (weights * torch.stack(losses)).sum())


def test_documents_and_padding_count_as_in_any_loss():
    model = small_model(with_loss(small_config(), replace(POISSON, prior="uniform", rate=None)))
    ids, labels = random_ids(2, 9), random_ids(2, 9, seed=1)
    is_padding = torch.zeros(2, 9, dtype=torch.bool)
    is_padding[1, 6:] = True
    documents = (torch.arange(9) > 3).long().expand(2, 9)
    output = model(ids, labels, documents, is_padding)
    scrambled = ids.where(~is_padding, (ids + 1) % 17)
    again = model(scrambled, labels, documents, is_padding)
    torch.testing.assert_close(output.loss, again.loss)
    losses = [shallower(model, r)(ids, labels, documents, is_padding).lm_loss for r in (1, 2, 3)]
    torch.testing.assert_close(output.lm_loss, torch.stack(losses).mean())


def test_random_loops_repeat_the_last_state():
    model = small_model(with_loss(small_config(RandomLoops()), LoopLoss()))
    ids = random_ids(2, 9)
    while (output := model(ids, labels=ids)).depths.max() != 2:
        model.advance([output])
    first, second, third = output.recursions[0].states
    assert torch.equal(second, third)
    assert not torch.equal(first, second)


def test_evaluation_reads_out_the_last_loop_only():
    model = small_model(with_loss(small_config(), POISSON)).eval()
    plain = shallower(model, 3).eval()
    ids = random_ids(2, 9)
    output = model(ids, labels=ids)
    assert output.recursions[0].states == ()
    assert torch.equal(output.loss, plain(ids, labels=ids).loss)


def test_a_folder_keeps_the_settings(tmp_path):
    model = small_model(with_loss(small_config(), POISSON))
    save_model(model, tmp_path / "model")
    assert load_model(tmp_path / "model").config == model.config


def test_confident_tokens_of_a_trained_model_exit_early_with_the_same_answer():
    config = replace(small_config(num_recursions=3, ends=(1, 0)), num_unrolled_layers=4)
    torch.manual_seed(0)
    model = MoRTransformer(with_loss(config, LoopLoss()))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = (torch.arange(12) + torch.arange(4)[:, None]) % 5
    for _ in range(60):
        optimizer.zero_grad()
        model(ids[:, :-1], labels=ids[:, 1:]).loss.backward()
        optimizer.step()
    request = Request(tuple(ids[0, :6].tolist()), 4)
    (alone,) = serve(model, [request])
    with_early_exit(model, Confidence(0.6))
    (early,) = serve(model, [request])
    assert early.tokens == alone.tokens == [1, 2, 3, 4]
    assert sum(early.depths) < 0.7 * sum(alone.depths)


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: LoopLoss(rate=0.5), "no effect on a uniform prior"),
    (lambda: LoopLoss("geometric"), r"rate=None must be in \(0, 1\)"),
    (lambda: LoopLoss("geometric", 1.0), r"must be in \(0, 1\)"),
    (lambda: LoopLoss("poisson", 0.0), "must be above 0 and finite"),
    (lambda: LoopLoss("poisson", math.nan), "must be above 0 and finite"),
    (lambda: LoopLoss("normal"), "LoopLoss.prior='normal' is unknown"),
    (lambda: LoopLoss(scale_penalty=-1.0), "scale_penalty=-1.0 must be 0 or more"),
    (lambda: RecursionConfig(1, loop_loss=LoopLoss()), "needs several steps"),
    (lambda: RecursionConfig(2, "sequence", loop_loss=LoopLoss()), "repeats as a whole"),
])  # fmt: skip
def test_a_mistake_is_answered_with_what_is_allowed(mistake: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        mistake()
