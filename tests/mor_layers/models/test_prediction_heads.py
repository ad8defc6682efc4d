"""Heads of multi-token prediction are trained on the tokens that they predict, and on no others."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    MoEConfig,
    RecursionConfig,
    load_model,
    save_model,
)
from mor_layers.costs import account
from mor_layers.models import MultiTokenPrediction
from mor_layers.recursion import LoopLoss, StepContext
from mor_layers.selection import Tokens
from mor_layers.weights import unrolled_weights
from tests.mor_layers.costs.test_accounting import BATCH, measure
from tests.mor_layers.small_models import plain_config, random_ids, small_config, small_model

TWO = MultiTokenPrediction(2, 0.3)
EXPERTS = MoEConfig(4, 2, ffn_hidden_size=8, bias_update_rate=0.01)


def by_loops(model: Any, states: torch.Tensor, ids: torch.Tensor, labels: Any, same: Any) -> Any:
    """The mean loss of the heads for one sequence, token by token. `states` is `[s h]`."""
    length, total = len(ids), 0.0
    for distance, head in enumerate(model.prediction_heads, start=1):
        tokens = Tokens.whole_sequence(length, 1, documents=same[:, None])
        later = [int(ids[i + distance]) if i + distance < length else 0 for i in range(length)]
        embedded = model.embedding(torch.tensor(later))
        states = head(states[:, None], embedded[:, None], StepContext(0, tokens))[:, 0]
        losses = []
        for i in range(length - distance):
            target = int(labels[i + distance])
            if target >= 0 and same[i] == same[i + distance]:
                logits = model.output(states[i])
                losses.append(F.cross_entropy(logits, torch.tensor(target)))
        total = total + sum(losses) / max(1, len(losses))
    return total / len(model.prediction_heads)


@pytest.mark.parametrize("length", [2, 3, 9])
def test_losses_and_gradients_are_those_of_a_loop(length: int) -> None:
    model = small_model(replace(small_config(), multi_token_prediction=TWO)).train()
    ids, labels = random_ids(1, length), random_ids(1, length, seed=1)
    labels[:, length // 2] = -100
    same = (torch.arange(length) > 3).long()
    seen = list[torch.Tensor]()
    handle = model.norm.register_forward_hook(lambda module, given, states: seen.append(states))
    output = model(ids, labels=labels, documents=same[None])
    handle.remove()
    loss = 0.3 * by_loops(model, seen[0][:, 0], ids[0], labels[0], same)
    torch.testing.assert_close(output.losses["multi_token_prediction"], torch.as_tensor(loss))
    output.loss.backward(retain_graph=True)
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (output.lm_loss + loss).backward()
    for name, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got[name], wanted, rtol=1e-5, atol=1e-6)


def test_heads_change_nothing_but_the_loss_of_training(tmp_path) -> None:
    config = small_config(ExpertChoice(), 3)
    plain = small_model(config)
    model = small_model(replace(config, multi_token_prediction=TWO))
    model.load_state_dict(plain.state_dict(), strict=False)
    ids = random_ids(2, 9)
    for mode in (True, False):
        first, second = (m.train(mode)(ids, labels=ids) for m in (plain, model))
        assert torch.equal(first.logits, second.logits)
        assert first.lm_loss == second.lm_loss
        assert ("multi_token_prediction" in second.losses) == mode
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    state = model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in again.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"recursion": RecursionConfig(3, router=ExpertChoice(), loop_loss=LoopLoss())},
        {"moe": EXPERTS},
        {"moe": EXPERTS, "dense_ends": True},
        {
            "num_unrolled_layers": 4,
            "recursion": (RecursionConfig(2, "cycle", block_layers=1),) * 2,
        },
    ],
    ids=["a loss after every loop", "experts", "dense ends", "several recursions"],
)
def test_heads_train_beside(changes: dict[str, Any]) -> None:
    config = replace(small_config(), multi_token_prediction=TWO, **changes)
    model, ids = small_model(config).train(), random_ids(2, 9)
    output = model(ids, labels=ids.roll(-1, 1))
    output.loss.backward()
    assert all(p.grad is not None for p in model.prediction_heads.parameters())
    has_experts = "moe" in changes and not changes.get("dense_ends")
    assert [bool(use) for use in output.head_experts] == [has_experts] * 2
    biases = [b for n, b in model.prediction_heads.named_buffers() if n.endswith("router.bias")]
    model.advance([output])
    assert len(biases) == 2 * has_experts and all(bias.any() for bias in biases)


@pytest.mark.parametrize("moe", [None, EXPERTS])
def test_parameters_and_flops_are_counted(moe: MoEConfig | None) -> None:
    config = replace(small_config(), multi_token_prediction=TWO, moe=moe)
    model, cost = small_model(config).train(), account(config, 9)
    measured = measure(model, random_ids(BATCH, 9))
    assert cost.parameters.total == sum(p.numel() for p in model.parameters())
    assert measured.training == BATCH * cost.training.total
    without = account(replace(config, multi_token_prediction=None), 9)
    assert cost.forward == without.forward and cost.kv_bytes() == without.kv_bytes()


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_heads=0 must be in 1\.\.4096"):
        MultiTokenPrediction(0)
    with pytest.raises(ValueError, match="loss_coefficient=-1 must be 0 or more"):
        MultiTokenPrediction(1, -1)
    config: DecoderConfig = replace(plain_config(3), multi_token_prediction=TWO)
    with pytest.raises(ValueError, match="multi_token_prediction is set, which a plain decoder"):
        unrolled_weights(small_model(config).state_dict(), config)
