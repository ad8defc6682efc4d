"""Rotary settings are found where any release of transformers has written them."""

import pytest
from transformers import LlamaConfig

from mor_huggingface.checkpoints.rope import read_rope
from mor_layers.models import Llama3Scaling, YarnScaling

LLAMA = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DEEPSEEK = {  # of DeepSeek-V3's config.json
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}


@pytest.mark.parametrize(
    ("values", "base", "scaling"),
    [
        (
            {"rope_theta": 1e4, "rope_scaling": DEEPSEEK, "max_position_embeddings": 163840},
            1e4,
            YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
        ),
        (
            {
                "rope_theta": 5e5,
                "max_position_embeddings": 131072,
                "rope_scaling": LLAMA
                | {"original_max_position_embeddings": 8192, "rope_type": "llama3"},
            },
            5e5,
            Llama3Scaling(8.0, 8192),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": None,
              "original_max_position_embeddings": 1024}, "max_position_embeddings": 4096},
            1e6,
            YarnScaling(4.0, 1024),
        ),
        (
            {"rope_parameters": LLAMA | {"rope_type": "llama3"}, "max_position_embeddings": 64},
            1e4,
            Llama3Scaling(8.0, 64),
        ),
        ({"rope_theta": 7.0, "rope_scaling": None}, 7.0, None),
    ],
)  # fmt: skip
def test_settings_of_files_old_and_new(values, base, scaling):
    assert read_rope(values, "config.json") == (base, scaling)


def test_what_transformers_writes_of_an_old_file_is_the_same():
    old = {"rope_theta": 5e5, "rope_scaling": LLAMA | {"rope_type": "llama3"}}
    new = LlamaConfig(**old, max_position_embeddings=64).to_dict()
    assert "rope_scaling" not in new
    assert read_rope(new, "new") == read_rope(old | {"max_position_embeddings": 64}, "old")
