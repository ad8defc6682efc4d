"""A folder with a model is what was saved."""

from pathlib import Path

import pytest
import torch

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    MoEConfig,
    MoRTransformer,
    RecursionConfig,
    save_model,
)
from mor_tools.serving.loading import load


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_loaded_again(tmp_path: Path, tied: bool) -> None:
    recursion = RecursionConfig(2, router=ExpertChoice(warmup_steps=3))
    config = DecoderConfig(
        256, 16, 16, 4, 2, tie_embeddings=tied, recursion=recursion, moe=MoEConfig(2)
    )
    model = MoRTransformer(config)
    model.recursions[0].router.bars[1] = 0.25
    for _ in range(2):  # the second replaces the first
        save_model(model, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = load(str(tmp_path / "model"))
    assert loaded.name == "model" and loaded.model.config == config
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert (loaded.model.output.weight is loaded.model.embedding.weight) == tied


@pytest.mark.parametrize("content", ["", "{}", "[[]]", "no json", '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    save_model(MoRTransformer(DecoderConfig(256, 16, 16, 1, 2)), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer: "):
        load(str(tmp_path / "model"))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    save_model(MoRTransformer(DecoderConfig(256, 16, 16, 1, 2)), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load(str(tmp_path / "model"))
