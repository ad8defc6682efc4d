"""A model's folder gives the model back, or says what is wrong with it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mor_layers import FixedDepth, MoEConfig, load_model, save_model
from mor_layers.weights import written_whole
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
        ("{", "config.json is no JSON"),
        ("[]", "expected a mapping"),
        ('{"model_type": "llama"}', "model_type='llama' must be 'mor'"),
        ('{"model_type": "mor"}', "mor: expected a mapping of settings"),
    ],
)
def test_a_wrong_config_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_folder_cut_short_is_named(tmp_path):
    save_model(small_model(small_config()), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut short"):
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
