"""Scaled rotary frequencies are those of transformers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mor_layers import DecoderConfig, from_mapping, to_mapping
from mor_layers.models import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from mor_layers.models.rotary import Rotary
from tests.mor_layers.small_models import random_ids, small_config, small_model

SCALINGS: dict[str, tuple[RopeScaling, float]] = {
    "linear": (LinearScaling(3.0), 1e4),
    "Llama 3.1": (Llama3Scaling(8.0, 8192), 5e5),
    "Llama 3, no kept frequencies": (Llama3Scaling(8.0, 1, 1.5, 2.0), 50.0),
    "Qwen": (YarnScaling(4.0, 32768), 1e6),
    "DeepSeek-V3": (YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0), 1e4),
    "DeepSeek-V2": (YarnScaling(40.0, 4096, mscale=0.707, mscale_all_dim=0.3), 1e4),
    "only one mscale": (YarnScaling(40.0, 4096, mscale_all_dim=0.3), 1e4),
    "GPT-OSS": (YarnScaling(32.0, 4096, truncate=False), 150000.0),
    "a factor of attention": (YarnScaling(2.0, 64, attention_factor=1.7), 500.0),
    "a ramp of one pair": (YarnScaling(4.0, 4, 1.00001, 1.0, truncate=False), 1.5),
    "no lengthening": (YarnScaling(1.0, 4096), 1e4),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_size", [2, 10, 64])
def test_the_rotation_is_that_of_transformers(name: str, head_size: int) -> None:
    scaling, base = SCALINGS[name]
    fields = {n: v for n, v in to_mapping(scaling).items() if v is not None}
    config = LlamaConfig(head_dim=head_size, rope_parameters=fields | {"rope_theta": base})
    frequencies, factor = ROPE_INIT_FUNCTIONS[fields["rope_type"]](config, None)
    positions = torch.tensor([[0, 1], [7, 130], [4095, 100_000]])
    rotary = Rotary.at(positions, head_size, base, torch.float64, scaling)
    angles = positions[..., None] * frequencies
    half = head_size // 2
    # An angle of 1e5 radians has an error of 1e5 * 6e-8 in fp32.
    wanted = angles.cos() * factor, angles.sin() * factor
    assert_close = torch.testing.assert_close
    for got, want in zip(
        (rotary.cos[:, :, 0, :half], rotary.sin[:, :, 0, half:]), wanted, strict=True
    ):
        assert_close(got[:2].float(), want[:2], rtol=1e-5, atol=2e-5)
        assert_close(got.float(), want, rtol=0, atol=2e-2)
    assert torch.equal(rotary.sin[..., :half], -rotary.sin[..., half:])


def test_every_kind_comes_back_from_plain_values() -> None:
    for scaling, base in SCALINGS.values():
        config = replace(small_config(), rope_scaling=scaling, rope_base=base)
        assert from_mapping(DecoderConfig, to_mapping(config)) == config


def test_a_scaled_model_is_another_model_at_late_positions_only() -> None:
    plain = small_config()
    scaled = replace(plain, rope_scaling=LinearScaling(4.0))
    ids = random_ids(1, 9)
    first, second = small_model(plain), small_model(scaled)
    second.load_state_dict(first.state_dict())
    same, other = first(ids).logits, second(ids).logits
    torch.testing.assert_close(other[:, 0], same[:, 0])
    assert (other[:, 1:] - same[:, 1:]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling(0.5), "factor=0.5 must be at least 1"),
        (lambda: LinearScaling(float("inf")), "factor=inf must be above 0, and finite"),
        (lambda: Llama3Scaling(8.0, 0), "original_max_position_embeddings=0 must be above 0"),
        (lambda: Llama3Scaling(8.0, 64, 4.0, 4.0), "high_freq_factor=4.0 must be above low"),
        (lambda: YarnScaling(8.0, 64, 1.0, 2.0), "beta_fast=1.0 must be above beta_slow=2.0"),
        (lambda: YarnScaling(8.0, 64, mscale=-1.0), "mscale=-1.0 must be above 0"),
        (lambda: YarnScaling(8.0, 64, mscale_all_dim=-1.0), "mscale_all_dim=-1.0 must be 0 or"),
        (lambda: YarnScaling("8", 64), "YarnScaling.factor='8' has the wrong type"),  # type: ignore[arg-type]
        (
            lambda: replace(small_config(), rope_base=1.0, rope_scaling=YarnScaling(8.0, 64)),
            "rope_base=1.0 must be above 1",
        ),
        (lambda: given({"rope_type": "ntk"}), "rope_scaling: expected a mapping with rope_type"),
        (lambda: given(8.0), "rope_scaling: expected a mapping with rope_type, one of linear"),
        (lambda: given({"rope_type": "linear"}), "rope_scaling: missing setting 'factor'"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def given(scaling: object) -> DecoderConfig:
    return from_mapping(DecoderConfig, to_mapping(small_config()) | {"rope_scaling": scaling})
