"""Scaled rotary frequencies in the pretraining script's settings."""

import pytest

from mor_layers.models import Llama3Scaling, YarnScaling
from mor_tools.pretraining.command_line import load_settings, schema
from mor_tools.pretraining.models.decoder import decoder_config
from tests.mor_tools.pretraining.models.test_latent_attention import LATENT
from tests.mor_tools.pretraining.runs import SMALL, TINY


def scaled(*settings: str):
    given = [f"model.rope_scaling.{setting}" for setting in settings]
    return load_settings(["--config", TINY, *SMALL, *given])


def test_the_model_has_the_scaling_of_the_settings() -> None:
    length = "original_max_position_embeddings=8192"
    settings = scaled("rope_type=llama3", "factor=8", length)
    assert decoder_config(settings, 257).rope_scaling == Llama3Scaling(8.0, 8192)


def test_another_type_leaves_nothing_of_the_one_in_the_file(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model:\n  rope_scaling:\n    rope_type: llama3\n    factor: 8.0\n"
        "    original_max_position_embeddings: 8192\n    high_freq_factor: 4.0\n"
    )
    changes = ["rope_type=yarn", "factor=2", "original_max_position_embeddings=64"]
    settings = load_settings(
        ["--config", str(path), *(f"model.rope_scaling.{change}" for change in changes)]
    )
    assert settings.model.rope_scaling == YarnScaling(2.0, 64)


def test_help_lists_every_type_with_its_fields() -> None:
    text = schema()
    for line in ("rope_type: linear", "rope_type: llama3", "high_freq_factor: float = 4.0"):
        assert line in text
    assert "truncate: bool = true" in text


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            ["rope_type=llama3", "factor=8", "original_max_position_embeddings=4096"],
            "model.rope_scaling with original_max_position_embeddings=4096 is not .* only 8192",
        ),
        (
            ["rope_type=yarn", "factor=8", "original_max_position_embeddings=64",
             "attention_factor=1.5"],
            "model.rope_scaling with attention_factor=1.5 is not supported by Megatron",
        ),
        (["rope_type=dynamic"], "model.rope_scaling: expected a mapping with rope_type, one of"),
    ],
)  # fmt: skip
def test_what_megatron_does_not_have_is_refused(settings: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        scaled(*settings)


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [
        ("{rope_type: linear, factor: 2}", "latent attention, which has YaRN only"),
        (
            "{rope_type: yarn, factor: 2, original_max_position_embeddings: 8, mscale_all_dim: 1}",
            "mscale_all_dim=1.0 needs an mscale",
        ),
        (
            "{rope_type: yarn, factor: 2, original_max_position_embeddings: 8, truncate: false}",
            "truncate=False is not supported by Megatron, only True",
        ),
    ],
)
def test_what_latent_attention_of_megatron_does_not_have(scaling: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_settings(["--config", TINY, *SMALL, *LATENT, f"model.rope_scaling={scaling}"])
