"""A model's folder gives the model back, or says what is wrong with it."""

import json
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mor_layers import FixedDepth, MoEConfig, load_model, save_model
from mor_layers.weights import written_whole
from mor_layers.weights.tensor_files import open_tensors
from tests.mor_layers.small_models import ROUTERS, small_config, small_model


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}, {"moe": MoEConfig(4, 2)}])
def test_a_saved_model_comes_back(tmp_path, router, fields):
    model = small_model(replace(small_config(ROUTERS[router]), **fields))
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.config == model.config
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(again.state_dict()[name], expected[name]) for name in expected)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert ("model.output.weight" in stored) == (not model.config.tie_embeddings)


def test_after_an_error_the_earlier_folder_stands_alone(tmp_path):
    save_model(small_model(small_config()), tmp_path / "model")
    with pytest.raises(TypeError), written_whole(tmp_path / "model") as partial:
        (partial / "model.safetensors").write_text(None)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "expected a mapping"),
        ('{"model_type": "llama"}', "model_type='llama' must be 'mor'"),
        ('{"model_type": "mor"}', "mor: expected a mapping of settings"),
        ("[" * 100_000 + "]" * 100_000, "is nested too deeply"),
    ],
)
def test_a_wrong_config_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_unrolled_layers": 1_000_002}, "num_unrolled_layers=1000002 must be at most 4096"),
        ({"num_unrolled_layers": 3_002}, "tensors, fewer than the 1002 layers"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**20}, "its settings describe"),
        ({"vocab_size": 2**31}, "vocab_size=2147483648 must be at most"),
        ({"hidden_size": 2**70}, "must be at most 16777216"),
        ({"rms_norm_epsilon": None}, "rms_norm_epsilon=None: expected float"),
    ],
)
def test_settings_that_its_files_cannot_fill_are_refused_at_once(tmp_path, change, message):
    save_model(small_model(small_config()), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    values["mor"] |= change
    path.write_text(json.dumps(values))
    before = time.monotonic()
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model")
    assert time.monotonic() - before < 1


@pytest.mark.parametrize(
    "weight_map", [None, [], ["model.safetensors"], {"a": None}, {"a": "../one.safetensors"}, 3]
)
def test_an_index_that_is_none_is_named(tmp_path, weight_map):
    save_model(small_model(small_config()), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "one.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        ValueError, match=r"index\.json is not a valid index of tensors: expected a mapping"
    ):
        load_model(tmp_path / "model")


def test_quantized_weights_are_refused(tmp_path):
    save_model(small_model(small_config()), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.embedding.weight"] = weights["model.embedding.weight"].to(torch.int8)
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"embedding.weight' has dtype torch.int8, .*Quantized"):
        load_model(tmp_path / "model")


def test_a_folder_cut_short_is_named(tmp_path):
    save_model(small_model(small_config()), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or truncated"):
        load_model(tmp_path / "model")


def test_a_folder_runs_no_code_unless_it_is_trusted(tmp_path, monkeypatch):
    save_model(small_model(small_config(FixedDepth())), tmp_path / "model")
    settings = tmp_path / "model" / "config.json"
    settings.write_text(settings.read_text().replace("fixed_depth", "of_the_folder:Router"))
    (tmp_path / "of_the_folder.py").write_text("raise SystemExit('the folder made this run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"of_the_folder.*trust_remote_code=True"):
        load_model(tmp_path / "model")
    with pytest.raises(SystemExit, match="the folder made this run"):
        load_model(str(tmp_path / "model"), trust_remote_code=True)


def test_a_file_name_that_no_file_system_takes_is_refused_in_a_short_line(tmp_path):
    index = {"weight_map": {"model.embedding.weight": "x" * 10_000}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected a mapping from tensors to names") as refused:
        open_tensors(tmp_path)
    assert len(str(refused.value)) < 500
