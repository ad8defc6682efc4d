"""A loss after every loop in a GPTModel: what the torch model computes, in every layout."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mor_layers import DecoderConfig, ExpertChoice, MoRTransformer, RecursionConfig, TokenChoice
from mor_layers.recursion import LoopLoss
from mor_layers.routers import ExitGate
from mor_megatron import recursion_block_spec
from mor_megatron.checkpoints import decoder_tensors, whole_tensors
from mor_megatron.layers import RecursionLayer, RecursionSubmodules
from mor_megatron.layers.routing.auxiliary_loss import RouterLossScaler
from mor_megatron.models import default_layer_spec
from mor_megatron.training import weigh_loops
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

LOSS = LoopLoss("geometric", 0.3, scale_penalty=0.2)
FIXED = RecursionConfig(3, loop_loss=LOSS)
EXPERT = RecursionConfig(3, router=ExpertChoice(alpha=0.5), loop_loss=LOSS, coda_layers=2)
TOKEN = RecursionConfig(3, router=TokenChoice(), loop_loss=LOSS)
TAUGHT = RecursionConfig(3, router=ExitGate(teaching=0.5), loop_loss=LOSS)
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.01,
    "moe_token_dispatcher_type": "alltoall",
}
SP = {"sequence_parallel": True}
FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
# name: ranks, layout, config, recursion
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], RecursionConfig]] = {
    "tp+sp, expert": (2, {"tp": 2}, SP, EXPERT),
    "ep x full recompute": (2, {"ep": 2}, MOE | FULL_RECOMPUTE, FIXED),
    "tp": (2, {"tp": 2}, {}, TOKEN),
    "dp": (2, {}, {}, FIXED),
    "tp+sp, taught gate": (2, {"tp": 2}, SP, TAUGHT),
    "tp, taught gate": (2, {"tp": 2}, {}, TAUGHT),
    "dp x full recompute, taught gate": (2, {}, FULL_RECOMPUTE, TAUGHT),
    "pp, token": (2, {"pp": 2}, {}, TOKEN),
    "pp, taught gate": (2, {"pp": 2}, {}, TAUGHT),
    "pp x full recompute, experts": (3, {"pp": 3}, MOE | FULL_RECOMPUTE, EXPERT),
}
DAILY = ("tp+sp, expert", "ep x full recompute", "pp, token", "tp+sp, taught gate")


@dataclass(frozen=True)
class Outcome:
    """What one layout computes."""

    loss: float
    gradients: dict[str, Tensor]


def built(recursion: RecursionConfig, config: dict[str, Any], weighs: bool = True) -> GPTModel:
    ends = 8 if recursion.coda_layers is None else 9
    (model,) = setup.tiny_gpt(
        setup.tiny_config(**{"num_layers": ends} | config),
        block=lambda c, vp_stage: recursion_block_spec(c, recursion, vp_stage=vp_stage),
    )
    if weighs:
        weigh_loops(model)
    return model


def loss_and_gradients(
    layout: dict[str, Any], recursion: RecursionConfig, config: dict[str, Any]
) -> Outcome:
    setup.initialize(**layout)
    wrapped = setup.data_parallel([built(recursion, config)])
    # A mixture of experts balances over the tokens of a micro-batch, so that this must not change.
    loss = setup.forward_backward(wrapped, setup.random_tokens(4, 16), 2)
    return Outcome(loss, setup.gather_gradients(wrapped))


@pytest.mark.parametrize(
    "name",
    [name if name in DAILY else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS],
)
def test_a_layout_computes_what_one_rank_computes(pool: WorkerPool, name: str) -> None:
    ranks, layout, config, recursion = LAYOUTS[name]
    alone = {key: value for key, value in config.items() if key in MOE}
    (expected,) = pool.run(loss_and_gradients, 1, layout={}, recursion=recursion, config=alone)
    for found in pool.run(
        loss_and_gradients, ranks, layout=layout, recursion=recursion, config=config
    ):
        assert found.loss == pytest.approx(expected.loss, abs=1e-6)
        torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-5, atol=1e-6)


def beside_the_torch_model(recursion: RecursionConfig) -> list[tuple[float, float]]:
    """Losses in training with documents, and in evaluation; Megatron's first."""
    setup.initialize()
    decoder = DecoderConfig(64, 32, 64, 8, 4, 2, recursion=recursion)
    theirs = built(recursion, {})
    ours = MoRTransformer(decoder)
    whole = whole_tensors([theirs])
    assert whole is not None
    ours.load_state_dict(decoder_tensors(whole, decoder))
    text = setup.random_tokens(2, 16)
    ids, labels = text[:, :-1], text[:, 1:]
    documents = (torch.arange(16) + torch.tensor([[0], [5]])) // 9
    same = documents[:, None, :, None] == documents[:, None, None, :]
    mask = same.tril().logical_not()
    positions = torch.arange(16).expand(2, 16)
    found = []
    for is_training in (True, False):
        ours.train(is_training)
        theirs.train(is_training)
        loss = theirs(ids, positions, mask, labels=labels).mean().item()
        found.append((loss, ours(ids, labels, documents).lm_loss.item()))
    assert theirs(ids, positions, mask).shape == (2, 16, 64)
    theirs.train()
    assert theirs(ids, positions, mask).shape == (2, 16, 64)
    return found


def gradients_of_the_gate() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of this model, and of the torch model with the same weights."""
    setup.initialize()
    decoder = DecoderConfig(64, 32, 64, 8, 4, 2, recursion=TAUGHT)
    theirs, ours = built(TAUGHT, {}), MoRTransformer(decoder)
    whole = whole_tensors([theirs])
    assert whole is not None
    ours.load_state_dict(decoder_tensors(whole, decoder))
    text = setup.random_tokens(2, 16)
    labels = text[:, 1:].clone()
    guesses = ours.eval()(text[:, :-1]).logits.argmax(dim=-1)
    labels[:, ::3] = guesses[:, ::3]  # so that the oracle finds some right
    ours.train()(text[:, :-1], labels=labels).losses["exit_gate"].backward()
    positions = torch.arange(16).expand(2, 16)
    RouterLossScaler.set_loss_scale(torch.ones(()))
    theirs(text[:, :-1], positions, None, labels=labels).mean().backward()
    router = theirs.decoder.layers[1].recursion.router
    return tuple(  # type: ignore[return-value]
        {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}
        for of in (router, ours.recursions[0].router)
    )


def test_the_gate_learns_what_it_learns_in_the_torch_model(pool: WorkerPool) -> None:
    ((found, expected),) = pool.run(gradients_of_the_gate, 1)
    assert set(expected) == {"norm", "weight", "bias"}
    assert expected["weight"].abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("recursion", [FIXED, TOKEN])
def test_the_loss_is_that_of_the_torch_model(pool: WorkerPool, recursion) -> None:
    ((training, evaluation),) = pool.run(beside_the_torch_model, 1, recursion=recursion)
    assert training[0] == pytest.approx(training[1], abs=1e-5)
    assert evaluation[0] == pytest.approx(evaluation[1], abs=1e-5)
    assert training[0] != pytest.approx(evaluation[0], abs=1e-3)


def taught_before_the_last_stage() -> str | None:
    setup.initialize(pp=2)
    config = {"pipeline_model_parallel_layout": "Et*7|tL"}
    try:
        built(TAUGHT, config)
    except ValueError as error:
        return str(error)
    return None


def test_a_gate_is_not_taught_on_an_earlier_stage_than_the_last(pool: WorkerPool) -> None:
    for told in pool.run(taught_before_the_last_stage, 2):
        assert told is not None and "whose last stage has the whole recursion" in told


def refusals() -> list[str]:
    from mor_megatron.layers import validate

    setup.initialize()
    model = built(FIXED, {}, weighs=False)
    ids = setup.random_tokens(1, 8)
    messages = []
    with pytest.raises(ValueError, match="loop_loss") as error:
        model(ids[:, :-1], torch.arange(8)[None], None, labels=ids[:, 1:])
    messages.append(str(error.value))
    with pytest.raises(ValueError, match="loop_loss") as error:
        validate(setup.tiny_config(num_layers=8, mtp_num_layers=1), FIXED)
    messages.append(str(error.value))
    config = setup.tiny_config(num_layers=8)
    config.pipeline_model_parallel_size = 2
    parts: Any = RecursionSubmodules([default_layer_spec(config)] * 2)
    with pytest.raises(ValueError, match="loop_loss") as error:
        RecursionLayer(config, parts, recursion=FIXED)
    messages.append(str(error.value))
    config.virtual_pipeline_model_parallel_size, config.overlap_p2p_comm = 2, True
    with pytest.raises(ValueError, match="loop_loss") as error:
        RecursionLayer(config, parts, recursion=FIXED)
    messages.append(str(error.value))
    return messages


def test_what_cannot_weigh_loops_is_refused_with_the_way_out(pool: WorkerPool) -> None:
    (messages,) = pool.run(refusals, 1)
    ways_out = [
        "Call mor_megatron.training.weigh_loops(model)",
        "Leave one of them out",
        "Set variable_seq_lengths=True on all stages",
        "or use recursion_pipeline_spec",
    ]
    assert all(way in message for way, message in zip(ways_out, messages, strict=True))
