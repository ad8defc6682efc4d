"""An exit gate that an oracle teaches: to stop at the first step whose read-out is right."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mor_layers import DecoderConfig, MoRTransformer, RecursionConfig
from mor_layers.recursion import LoopLoss
from mor_layers.routers import ExitGate
from mor_layers.weights import load_model, save_model
from mor_megatron.parallel import TAUGHT_EXITS_RULES, Arrangement, Names, require_rules
from tests.mor_layers.small_models import gradients, random_ids, small_config, small_model

STEPS = 4


def taught(teaching: float = 0.5) -> DecoderConfig:
    router = ExitGate(0.5, teaching=teaching)
    recursion = RecursionConfig(STEPS, "cycle", router, loop_loss=LoopLoss())
    return replace(small_config(num_recursions=STEPS, sharing="cycle"), recursion=recursion)


def by_hand(model: MoRTransformer, states: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The gate's loss, token by token and step by step, until a step is right."""
    router, losses = model.recursions[0].router, []
    for sequence in range(labels.shape[0]):
        for position in range(labels.shape[1]):
            label = int(labels[sequence, position])
            if label < 0:
                continue
            for state in states[:-1]:
                own = state[position, sequence]
                right = int(model.output(model.norm(own)).argmax()) == label
                normed = own.detach() / (own.detach().square().mean() + 1e-6).sqrt() * router.norm
                stop = torch.sigmoid(normed @ router.weight + router.bias)
                losses.append(-torch.log(stop if right else 1 - stop))
                if right:
                    break
    return torch.stack(losses).mean()


def test_the_gate_learns_to_stop_at_the_first_step_that_is_right():
    model, ids = small_model(taught()), random_ids(3, 7)
    guesses = model.eval()(ids).logits.argmax(dim=-1)
    labels = random_ids(3, 7, seed=5)
    labels[:, ::2] = guesses[:, ::2]  # so that some are right
    labels[0, 1] = -1
    output = model.train()(ids, labels=labels)
    states = output.recursions[0].states
    expected = 0.5 * by_hand(model, states, labels)
    torch.testing.assert_close(output.losses["exit_gate"], expected)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    output.losses["exit_gate"].backward()
    torch.testing.assert_close(gradients(model), wanted)
    moved = {name for name, gradient in wanted.items() if gradient.any()}
    assert moved == {f"recursions.0.router.{name}" for name in ("norm", "weight", "bias")}


def test_a_taught_gate_exits_where_the_answer_is_there():
    """Answers that step 1 has for even ids and no step has for odd ones: depth follows the id."""
    torch.manual_seed(0)
    model = small_model(taught(1.0))
    router = model.recursions[0].router
    optimizer = torch.optim.Adam(router.parameters(), 0.1)
    for parameter in set(model.parameters()) - set(router.parameters()):
        parameter.requires_grad_(False)
    for seed in range(60):
        ids = random_ids(8, 6, seed)
        states = model.recursions[0](model.embedding(ids.T), keeps_states=True).states
        first = model.output(model.norm(states[0])).argmax(dim=-1).T
        labels = torch.where(ids % 2 == 0, first, (first + 1) % 17)
        optimizer.zero_grad()
        model(ids, labels=labels).losses["exit_gate"].backward()
        optimizer.step()
    ids = random_ids(8, 6, 99)
    depths = model.eval()(ids).depths.float()
    assert depths[ids % 2 == 0].mean() < depths[ids % 2 == 1].mean() - 0.5


def test_teaching_is_kept_and_only_a_taught_gate_has_parameters(tmp_path):
    model = small_model(taught())
    save_model(model, tmp_path / "model")
    ids = random_ids(1, 9)
    assert torch.equal(load_model(tmp_path / "model").eval()(ids).depths, model.eval()(ids).depths)
    plain = MoRTransformer(taught(0.0))
    assert not list(plain.recursions[0].router.parameters())
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert "exit_gate" not in plain.train()(ids, labels=ids).losses


def test_what_cannot_be_taught_is_refused():
    with pytest.raises(ValueError, match="Give the recursion a loop_loss"):
        RecursionConfig(3, router=ExitGate(teaching=1.0))
    with pytest.raises(ValueError, match="teaching=-1"):
        ExitGate(teaching=-1.0)
    with pytest.raises(ValueError, match="teaching"):
        ExitGate(teaching=math.nan)


@pytest.mark.parametrize(
    ("coda", "pipeline", "layout", "fix"),
    [
        (1, 2, "one_stage", None),  # the prelude, and all the rest
        (0, 2, "one_stage", None),
        (1, 3, "one_stage", "pipeline_model_parallel_size=2 with recursion_block_spec"),
        (
            9,
            2,
            "one_stage",
            "pipeline_model_parallel_size=1 with recursion_block_spec, fewer layers",
        ),
        (1, 2, "steps_as_stages", "recursion steps as virtual stages: which .*_size=1 with"),
    ],
)
def test_the_last_stage_has_to_hold_what_is_taught(coda, pipeline, layout, fix):
    recursion = replace(taught().recursion, sharing="cycle", prelude_layers=1, coda_layers=coda)
    arrangement = Arrangement(
        1 + 2 * STEPS + coda, recursion, pipeline=pipeline, pipeline_layout=layout
    )
    if fix is None:
        require_rules(arrangement, TAUGHT_EXITS_RULES, Names())
        return
    with pytest.raises(ValueError, match=fix):
        require_rules(arrangement, TAUGHT_EXITS_RULES, Names())
