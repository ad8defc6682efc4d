"""Settings and weights of published checkpoints; test_reference.py says what they compute."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mor_layers import ExpertChoice, MoRTransformer, TokenChoice
from mor_tools.formats import config_from_published, load_published, published_names
from mor_tools.formats.published import published_aliases
from mor_tools.formats.published_settings import published_settings

CASES = sorted((Path(__file__).parents[2] / "reference").glob("*.json"))


def settings_of(name: str) -> dict:
    (path,) = (path for path in CASES if path.stem == name)
    return json.loads(path.read_text())


def weights_for(model: MoRTransformer) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {theirs: torch.rand_like(state[ours]) for ours, theirs in names_of(model).items()}


def names_of(model: MoRTransformer) -> dict[str, str]:
    return published_names(model.config)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_every_parameter_has_one_published_name(path):
    model = MoRTransformer(config_from_published(json.loads(path.read_text())))
    names = names_of(model)
    assert set(dict(model.named_parameters())) <= set(names) <= set(model.state_dict())
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_names_that_share_a_tensor_are_the_published_ones(path):
    settings = json.loads(path.read_text())
    assert published_aliases(config_from_published(settings)) == settings["tied"]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_settings_go_back(path):
    settings = json.loads(path.read_text())
    config = config_from_published(settings)
    back = published_settings(config)
    assert config_from_published(back) == config
    for name in ("recursive", "kv_sharing", "mor"):
        assert back[name].keys() == settings[name].keys()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_every_weight_of_a_checkpoint_finds_its_place(path):
    model = MoRTransformer(config_from_published(json.loads(path.read_text())))
    weights = weights_for(model)
    load_published(model, weights)
    state = model.state_dict()
    for ours, theirs in names_of(model).items():
        assert torch.equal(state[ours], weights[theirs])


def test_a_missing_weight_is_named():
    model = MoRTransformer(config_from_published(settings_of("recursive_cycle_r2")))
    weights = weights_for(model)
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"no 'model.norm.weight' \(for 'norm.weights.0'\)"):
        load_published(model, weights)


def test_a_weight_of_another_shape_is_named():
    model = MoRTransformer(config_from_published(settings_of("recursive_cycle_r2")))
    weights = weights_for(model) | {"model.norm.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \(3,\).* needs \(32,\)"):
        load_published(model, weights)


def test_other_lengths_of_prelude_and_coda_have_no_names():
    config = config_from_published(settings_of("recursive_cycle_r2"))
    assert config.recursion is not None
    layers = config.num_unrolled_layers
    same = replace(config.recursion, prelude_layers=0, coda_layers=0)
    assert published_names(replace(config, recursion=same)) == published_names(config)
    longer = replace(config.recursion, coda_layers=2)
    with pytest.raises(ValueError, match=r"cannot express .*coda_layers=2: their lengths"):
        published_names(replace(config, num_unrolled_layers=layers + 2, recursion=longer))


def test_expert_choice_without_activation_leaves_alpha_out():
    settings = copy.deepcopy(settings_of("expert_choice_middle_cycle_r3_sigmoid_aux_loss"))
    settings["mor"]["expert"]["router_func"] = None
    recursion = config_from_published(settings).recursion
    assert recursion is not None
    assert isinstance(recursion.router, ExpertChoice)
    assert (recursion.router.activation, recursion.router.alpha) == ("none", 1.0)


def test_settings_are_translated():
    config = config_from_published(settings_of("token_choice_middle_cycle_r2_sigmoid_loss_free"))
    assert config.recursion is not None
    assert config.recursion.router == TokenChoice(
        activation="sigmoid", alpha=0.1, balancing="loss_free", balancing_coefficient=0.001
    )
    shared = config_from_published(settings_of("expert_choice_middle_cycle_r3_kv_sharing_update"))
    assert shared.recursion is not None
    assert shared.recursion.kv_policy == "sharing_with_update"
    assert config_from_published(settings_of("vanilla")).recursion is None
