"""Huginn in and out: equal logits at every number of loops, and the same tensors after the way back.

`huginn_checkpoint` is a tiny model with random weights, saved by the public modelling code, and
`huginn_recorded.safetensors` has what that code computes with an initial state of zero: `ids` `[b s]`,
and `logits.N` `[b s v]` after N loops.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mor_huggingface.checkpoints.huginn import config_from_huginn, huginn_config, open_huginn
from mor_layers import MoRTransformer, RecursionConfig, load_model
from mor_layers.costs import account
from mor_layers.generation import Request
from mor_layers.recursion import StateAdapter
from mor_layers.weights import write_model
from mor_tools import commands
from mor_tools.formats import detected
from tests.mor_layers.costs.test_accounting import BATCH, measure
from tests.mor_layers.generation.served import assert_exact, serve
from tests.mor_layers.small_models import random_ids, small_config, small_model

PLACE = Path(__file__).parent
SOURCE = PLACE / "huginn_checkpoint"
RECORDED = load_file(PLACE / "huginn_recorded.safetensors")
VALUES = json.loads((SOURCE / "config.json").read_text())


def imported(folder: Path, **changes: Any) -> MoRTransformer:
    """The checkpoint with another config.json, as a model of ours."""
    theirs, ours = folder / "changed", folder / "ours"
    shutil.copytree(SOURCE, theirs)
    (theirs / "config.json").write_text(json.dumps(VALUES | changes))
    ours.mkdir()
    write_model(open_huginn(theirs), ours)
    return load_model(ours).eval()


@pytest.mark.parametrize("loops", [2, 3, 5])
def test_logits_are_those_of_the_public_code_at_every_number_of_loops(tmp_path, loops):
    assert detected(SOURCE).name == "huginn"
    model = imported(tmp_path, mean_recurrence=loops)
    with torch.no_grad():
        logits = model(RECORDED["ids"]).logits
    torch.testing.assert_close(logits, RECORDED[f"logits.{loops}"], rtol=1e-5, atol=1e-5)


def test_a_model_comes_back_bit_for_bit_through_our_format(tmp_path):
    commands.main(["convert", str(SOURCE), str(tmp_path / "ours")])
    commands.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "huginn"])
    original, back = (load_file(f / "model.safetensors") for f in (SOURCE, tmp_path / "back"))
    assert set(original) == set(back)
    for name, tensor in original.items():
        assert torch.equal(tensor, back[name]), name
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    for name in set(VALUES) & set(written):
        assert written[name] == VALUES[name], name


def test_generation_with_caches_is_a_full_forward_pass(tmp_path):
    model = imported(tmp_path)
    requests = [Request((1, 5, 3, 7), 6), Request((2, 11), 4)]
    for request, served in zip(requests, serve(model, requests), strict=True):
        assert_exact(model, request, served)


def test_parameters_and_flops_are_counted(tmp_path):
    model, length = imported(tmp_path), 9
    cost = account(model.config, length)
    assert cost.parameters.total == sum(parameter.numel() for parameter in model.parameters())
    measured = measure(model, random_ids(BATCH, length))
    assert measured.forward == BATCH * cost.forward.total
    # The first step's state is zero, which needs no gradient: a saving that is not counted.
    assert measured.training <= BATCH * cost.training.total


def test_training_begins_at_a_drawn_state_and_evaluation_at_zero():
    adapted = RecursionConfig(3, adapter=StateAdapter(0.5))
    model, ids = small_model(replace(small_config(), recursion=adapted)), random_ids(2, 9)
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.prelude.parameters())
    step_input = model.recursions[0].step_input
    origin, state = torch.randn(4, 1, 12), torch.randn(4, 1, 12)
    weight = step_input.projections[0]
    for step, before in ((0, torch.zeros_like(state)), (1, state)):
        found = step_input.eval()(step, state, origin)
        torch.testing.assert_close(found, before @ weight[:, :12].T + origin @ weight[:, 12:].T)
    assert step_input.train()._initial(torch.zeros(5000, 1, 12), 0.5).std() == pytest.approx(
        0.4933, abs=0.01  # of a normal distribution that is cut off at three deviations
    )  # fmt: skip
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"injection_type": "add"}, "injection_type='add'"),
        ({"qk_bias": False}, "qk_bias=False"),
        ({"nonlin_name": "GELU"}, "nonlin_name='GELU'"),
        ({"state_init": "zero"}, "state_init='zero'"),
        ({"test_time_noise": 0.5}, "test_time_noise=0.5"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1"),
        ({"mean_recurrence": 1}, "mean_recurrence=1 must lie between 2"),
        ({"intermediate_size": None}, "intermediate_size=None must be an integer"),
    ],
)
def test_settings_that_ours_do_not_have_are_refused_by_name(changes, reason):
    with pytest.raises(ValueError, match=reason):
        config_from_huginn(VALUES | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sum_norms": False}, "sum_norms=False"),
        ({"embedding_scale": 1.0}, "embedding_scale=1.0"),
        ({"qk_norm": True}, "qk_norm=True"),
        ({"recursion": {"kv_policy": "recursive_sharing"}}, "kv_policy='recursive_sharing'"),
        ({"recursion": {"adapter": None}}, "adapter=None"),
        ({"recursion": {"exit_norm": False}}, "exit_norm=False"),
    ],
)
def test_models_that_are_no_huginn_are_not_written(changes, reason):
    config = config_from_huginn(VALUES)
    if "recursion" in changes:
        changes = {"recursion": replace(config.recursion, **changes["recursion"])}
    with pytest.raises(ValueError, match=f"{reason}.* cannot be written as huginn_raven"):
        huginn_config(replace(config, **changes))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("transformer.prelude.0.attn.Wqkv.weight", "has no tensor"),
        ("transformer.other.weight", "has no tensor 'transformer.other.weight'"),
    ],
)
def test_missing_and_unknown_tensors_are_refused(tmp_path, name, reason):
    shutil.copytree(SOURCE, tmp_path / "other")
    tensors = load_file(SOURCE / "model.safetensors")
    if tensors.pop(name, None) is None:
        tensors[name] = torch.zeros(1)
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ValueError, match=reason):
        open_huginn(tmp_path / "other")


def test_norms_that_differ_are_refused(tmp_path, capsys):
    model = imported(tmp_path)
    with torch.no_grad():
        model.norm.weights[0].add_(1)
    from mor_layers import save_model

    save_model(model, tmp_path / "trained")
    with pytest.raises(SystemExit):
        commands.main(
            ["convert", str(tmp_path / "trained"), str(tmp_path / "back"), "--to", "huginn"]
        )
    assert "coda.input_norm.weights.0 differs" in capsys.readouterr().err
