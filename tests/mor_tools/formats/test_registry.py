"""What a path holds is told from its files, by one detector that all commands and runs ask."""

import json
from pathlib import Path

import pytest

from mor_layers import save_model
from mor_tools.formats import detected, model_folder, opened, trained_length
from tests.mor_layers.small_models import small_config, small_model

CASE = Path(__file__).parents[2] / "reference" / "recursive_cycle_r2"


def config(folder: Path, **values) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished pretraining run, as far as its folder goes."""
    folder = tmp_path / "run"
    save_model(small_model(small_config()), folder / "model")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text("step_00000002")
    (folder / "run.json").write_text(json.dumps({"settings": {"data": {"sequence_length": 16}}}))
    return folder


def test_each_format_shows_in_its_files(tmp_path, run):
    sections = {"recursive": {}, "kv_sharing": {}, "mor": {}}
    llama = config(tmp_path / "llama", model_type="llama")
    published = config(tmp_path / "published", model_type="llama", **sections)
    found = [detected(path).name for path in (run, run / "model", llama, published, CASE)]
    assert found == ["megatron", "mor", "llama", "published", "published"]


def test_a_finished_run_has_a_model_of_ours_and_says_how_long_its_texts_were(run):
    assert model_folder(run) == model_folder(run / "model") == run / "model"
    assert opened(run / "model").config == small_config()
    assert trained_length(run / "model") == 16
    own = run / "model" / "config.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | {"max_position_embeddings": 99}))
    assert trained_length(run / "model") == 99
    (run / "run.json").unlink()
    own.write_text("{}")
    assert trained_length(run / "model") is None


def test_what_is_no_model_of_ours_is_answered(tmp_path, run):
    (run / "model" / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"in format 'megatron', not 'mor'. Convert it with `mor co"
    ):
        model_folder(run)
    with pytest.raises(ValueError, match=r"is not a model: it has no config.json"):
        model_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        opened(tmp_path / "nowhere")
