"""Llama checkpoints written by transformers go to our format and back with equal logits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

from mor_huggingface.checkpoints.llama import open_llama, write_llama
from mor_layers import FixedDepth, MoRTransformer, RecursionConfig, load_model, save_model
from mor_layers.recursion import SHARING_SCHEMES
from mor_layers.weights import open_model, write_model
from tests.mor_layers.small_models import random_ids, randomized, small_config, small_model

SIZES = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(folder: Path, dtype: torch.dtype = torch.float32, **fields) -> LlamaForCausalLM:
    model = randomized(LlamaForCausalLM(LlamaConfig(**SIZES | fields))).to(dtype)
    model.save_pretrained(folder)
    return model.eval()


def imported(source: Path, target: Path) -> MoRTransformer:
    target.mkdir()
    write_model(open_llama(source), target)
    return load_model(target)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}])
def test_a_llama_keeps_its_logits_and_comes_back_bit_for_bit(tmp_path, fields):
    original = llama(
        tmp_path / "hf", rope_parameters={"rope_type": "default", "rope_theta": 500.0}, **fields
    )
    ids = random_ids(2, 9)
    model = imported(tmp_path / "hf", tmp_path / "torch")
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    (tmp_path / "back").mkdir()
    write_llama(open_model(tmp_path / "torch"), tmp_path / "back")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(again(ids).logits, original(ids).logits)
    assert again.config.eos_token_id == 2 and again.config.max_position_embeddings == 64


FAMILY = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, tied": Qwen2Config(**SIZES, tie_word_embeddings=True, sliding_window=8),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "smollm, tied": LlamaConfig(**SIZES | {"num_attention_heads": 2}, tie_word_embeddings=True),
    "heads wider than the model": LlamaConfig(**SIZES, head_dim=6),
    "llama 3.1": LlamaConfig(
        **SIZES,
        head_dim=16,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 0.25,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8,
        },
    ),
    "qwen2, YaRN": Qwen2Config(
        **SIZES,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 50.0,
            "factor": 4.0,
            "beta_fast": 1.0,
            "beta_slow": 0.1,
            "original_max_position_embeddings": 8,
        },
    ),
    "linear": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
    ),
}


@pytest.mark.parametrize("name", FAMILY)
def test_the_llama_family_keeps_logits_and_comes_back_bit_for_bit(tmp_path, name):
    original = randomized(AutoModelForCausalLM.from_config(FAMILY[name])).eval()
    original.save_pretrained(tmp_path / "hf")
    ids = random_ids(2, 9)
    model = imported(tmp_path / "hf", tmp_path / "torch")
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    (tmp_path / "back").mkdir()
    write_llama(open_model(tmp_path / "torch"), tmp_path / "back")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(again) is type(original)
    assert torch.equal(again(ids).logits, original(ids).logits)


def test_bfloat16_and_several_files_and_bin_are_read(tmp_path):
    original = llama(tmp_path / "one", torch.bfloat16)
    original.save_pretrained(tmp_path / "several", max_shard_size="4KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "one" / "config.json", tmp_path / "bin")
    torch.save(original.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    first = open_llama(tmp_path / "one").weights
    for name in ("several", "bin"):
        weights = open_llama(tmp_path / name).weights
        assert all(torch.equal(first[n], weights[n]) for n in first)
        assert weights["embedding.weight"].dtype == torch.bfloat16


def test_a_mistral_without_a_window_is_a_llama(tmp_path):
    model = randomized(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))).eval()
    model.save_pretrained(tmp_path / "hf")
    ids = random_ids(1, 9)
    ours = imported(tmp_path / "hf", tmp_path / "torch")(ids).logits
    torch.testing.assert_close(ours, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharing", SHARING_SCHEMES)
@pytest.mark.parametrize("share_norms", [True, False])
def test_a_recursion_without_a_router_unrolls_into_a_llama(tmp_path, sharing, share_norms):
    config = small_config(FixedDepth(), 3, sharing, share_norms=share_norms, block_size=2)
    model = small_model(config)
    save_model(model, tmp_path / "torch")
    (tmp_path / "hf").mkdir()
    write_llama(open_model(tmp_path / "torch"), tmp_path / "hf")
    ids = random_ids(2, 9)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()(ids).logits
    torch.testing.assert_close(theirs, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=True"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=True"),
        ({"model_type": "gemma"}, "model_type='gemma'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters: missing .*'factor'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"sliding_window": 32}, "sliding_window=32"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None must be a number"),
        ({"rope_parameters": {"rope_theta": []}}, r"rope_theta=\[\] must be a number"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\]: expected a mapping"),
        ({"num_hidden_layers": 1_000_000}, "num_unrolled_layers=1000000 must be at most 4096"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_the_core_lacks_is_refused_by_name(tmp_path, fields, message):
    llama(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        open_llama(tmp_path)


def test_a_router_has_no_place_in_a_llama(tmp_path):
    recursion = RecursionConfig(3, kv_policy="recursive_sharing")
    save_model(MoRTransformer(replace(small_config(), recursion=recursion)), tmp_path / "torch")
    with pytest.raises(ValueError, match="recursive_sharing"):
        write_llama(open_model(tmp_path / "torch"), tmp_path)


def test_damage_is_named_by_file_and_tensor(tmp_path):
    llama(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.3.mlp.up_proj.weight"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or truncated"):
        open_llama(tmp_path)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, path)
    with pytest.raises(ValueError, match=rf"'{name}' has shape \(23, 16\).*\(24, 16\)"):
        load_all(open_llama(tmp_path).weights)
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(ValueError, match=f"has no tensor '{name}'"):
        open_llama(tmp_path)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}, path)
    with pytest.raises(
        ValueError, match=r"with its settings has no tensor 'model.layers.0.self_attn.q_proj.bias'"
    ):
        open_llama(tmp_path)
    path.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[:300])
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged"):
        open_llama(tmp_path)


def load_all(weights) -> None:
    for name in weights:
        weights[name]
