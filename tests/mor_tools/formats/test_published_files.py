"""Published checkpoints are read in all their forms and written back, or what is wrong is named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mor_layers import (
    ExpertChoice,
    RandomDepth,
    RecursionConfig,
    Relaxation,
    TokenChoice,
    load_model,
    save_model,
)
from mor_layers.weights import StoredModel, open_model, write_model
from mor_tools.formats.published_files import is_published, open_published, write_published
from tests.mor_layers.small_models import small_config, small_model
from tests.reference_cases import published_parameters

CASES = sorted((Path(__file__).parents[2] / "reference").glob("*.json"))
WISE = CASES[0].with_name("expert_choice_middle_cycle_r3_sigmoid_aux_loss.json")


def write(model: StoredModel, folder: Path) -> Path:
    folder.mkdir()
    write_published(model, folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(open_published(WISE), tmp_path / "published")


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_a_checkpoint_goes_to_our_format_and_back_bit_for_bit(tmp_path, case):
    assert is_published(case) and is_published(case.with_suffix(""))
    (tmp_path / "ours").mkdir()
    write_model(open_published(case), tmp_path / "ours")
    back = write(open_model(tmp_path / "ours"), tmp_path / "back")
    before = published_parameters(load_file(case.with_suffix(".safetensors")))
    after = load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = open_published(back)
    assert again.config == open_published(case).config
    assert again.facts["max_position_embeddings"] == 64
    state = load_model(tmp_path / "ours").state_dict()
    assert all(torch.equal(again.weights[name], state[name]) for name in again.weights)


def test_settings_in_a_yaml_file_and_every_tied_name_in_bin_are_read(tmp_path, folder):
    case = json.loads(WISE.read_text())
    values = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: tensors[theirs] for name, theirs in case["tied"].items()}
    bins = tmp_path / "bin"
    bins.mkdir()
    settings = {name: values.pop(name) for name in ("recursive", "kv_sharing", "mor")}
    (bins / "config.json").write_text(json.dumps(values))
    assert not is_published(bins)
    (bins / "settings.yaml").write_text(json.dumps({"dataset": "any"} | settings))
    torch.save(tensors, bins / "pytorch_model.bin")
    assert is_published(bins)
    model, expected = open_published(bins), open_published(folder)
    assert model.config == expected.config
    assert all(torch.equal(model.weights[name], expected.weights[name]) for name in model.weights)


def test_a_tensor_under_a_tied_name_alone_is_found(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.{}.block.1.mlp.up_proj.weight"
    tensors[name.format(3)] = tensors.pop(name.format(1))
    save_file(tensors, folder / "model.safetensors")
    expected = tensors[name.format(3)]
    ours = "recursions.0.layers.layers.1.mlp.up.weight"
    assert torch.equal(open_published(folder).weights[ours], expected)


def test_tied_tensors_that_differ_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.{}.block.0.self_attn.q_proj.weight"
    tensors[name.format(2)] = tensors[name.format(1)] + 1
    save_file(tensors, folder / "model.safetensors")
    model = open_published(folder)
    with pytest.raises(ValueError, match=r"layers.1.block.0.*layers.2.block.0.*tied, but differ"):
        model.weights["recursions.0.layers.layers.0.attention.query.weight"]


def test_a_trained_models_warm_up_is_over(folder):
    values = json.loads((folder / "config.json").read_text())
    values["mor"]["expert"]["cap_warmup_step"] = 500
    (folder / "config.json").write_text(json.dumps(values))
    assert open_published(folder).weights["recursions.0.router.training_steps"] == 500


def test_damage_is_named(folder):
    path = folder / "model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or truncated"):
        open_published(folder)
    name = "model.layers.2.mor_router.router.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(ValueError, match=f"has no tensor '{name}'"):
        open_published(folder)
    save_file(tensors | {"model.layers.1.mlp_router.router.weight": tensors[name].clone()}, path)
    with pytest.raises(
        ValueError, match=r"with its settings has no tensor 'model.layers.1.mlp_router"
    ):
        open_published(folder)
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, path)
    with pytest.raises(ValueError, match=rf"'{name}' has shape \(1, 31\)"):
        dict(open_published(folder).weights)
    values = json.loads((folder / "config.json").read_text())
    del values["mor"]["expert"]["alpha"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config.json: .* incomplete: 'alpha'"):
        open_published(folder)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (replace(small_config(), qk_norm=True), "qk_norm=True"),
        (replace(small_config(), head_dim=4), "head_dim=4"),
        (small_config(ExpertChoice(threshold=0.4)), "threshold=0.4"),
        (small_config(ExpertChoice(gate_bias=1.0)), "gate_bias=1.0"),
        (small_config(ExpertChoice(capacity_multiple=8)), "capacity_multiple=8"),
        (small_config(TokenChoice(gate_bias=1.0, activation="sigmoid")), "gate_bias=1.0"),
        (small_config(TokenChoice(balancing="none")), "balancing='none'"),
        (small_config(RandomDepth()), "router='RandomDepth'"),
        (
            replace(small_config(), recursion=RecursionConfig(3, relaxation=Relaxation(rank=2))),
            r"relaxation=Relaxation\(rank=2",
        ),
        (
            replace(small_config(), recursion=RecursionConfig(3, kv_policy="exit_state")),
            "kv_policy='exit_state'",
        ),
    ],
)
def test_what_the_published_code_lacks_is_refused_by_name(tmp_path, config, named):
    save_model(small_model(config), tmp_path / "ours")
    with pytest.raises(ValueError, match=named):
        write_published(open_model(tmp_path / "ours"), tmp_path)
