"""DeepSeek checkpoints written by transformers go to our format and back with equal logits."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    FineGrainedFP8Config,
)
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from mor_huggingface.checkpoints.deepseek import V2, V3, config_from_deepseek, deepseek_config
from mor_layers import DecoderConfig, ExpertChoice, MoEConfig, RecursionConfig, load_model
from mor_layers.costs import account
from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request
from mor_layers.models import LatentAttentionConfig, MultiTokenPrediction
from mor_layers.recursion import StepContext
from mor_layers.selection import Tokens
from mor_tools import commands
from mor_tools.formats import detected
from tests.mor_layers.costs.test_accounting import BATCH, measure
from tests.mor_layers.small_models import random_ids, randomized, small_config, small_model

SIZES: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
GROUPS = {"n_group": 4, "topk_group": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 40.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
}
"""With a ramp that a text of a few tokens shows."""
CHECKPOINTS = {
    "V3": (DeepseekV3Config, GROUPS),
    "V3 as Moonlight, no row of queries": (
        DeepseekV3Config,
        {"n_group": 1, "topk_group": 1, "q_lora_rank": None},
    ),
    "V3, experts everywhere, tied": (
        DeepseekV3Config,
        GROUPS | {"first_k_dense_replace": 0, "tie_word_embeddings": True},
    ),
    "V3, YaRN": (
        DeepseekV3Config,
        GROUPS | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "V2, YaRN": (
        DeepseekV2Config,
        {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.4}},
    ),
    "V2": (DeepseekV2Config, GROUPS | {"topk_method": "group_limited_greedy"}),
    "V2, greedy": (DeepseekV2Config, {}),
    "V2, dense": (DeepseekV2Config, {"first_k_dense_replace": 4}),
}


def checkpoint(folder: Path, name: str) -> torch.nn.Module:
    """A tiny model with random weights, saved by the public code."""
    kind, fields = CHECKPOINTS[name]
    model = randomized(
        AutoModelForCausalLM.from_config(kind(**SIZES | {"num_mtp_layers": 0} | fields))
    )
    for module in model.modules():  # zeros by default, which a conversion could leave out unnoticed
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 8).roll(3))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_keeps_its_logits_and_comes_back_bit_for_bit(tmp_path, name):
    original = checkpoint(tmp_path / "hf", name)
    family = V3 if name.startswith("V3") else V2
    assert detected(tmp_path / "hf").name == family.model_type
    commands.main(["convert", str(tmp_path / "hf"), str(tmp_path / "ours")])
    to = ["--to", family.model_type]
    commands.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), *to])
    model, ids = load_model(tmp_path / "ours").eval(), random_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    theirs, back = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "back"))
    assert set(theirs) == set(back)
    for tensor in theirs:
        assert torch.equal(theirs[tensor], back[tensor]), tensor
    values, written = (
        json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "back")
    )
    for field in set(values) & set(written) - {"transformers_version"}:
        if values[field] is not None:  # no groups are one group
            assert written[field] == values[field], field


@pytest.mark.parametrize("name", ["V3", "V3, YaRN"])
def test_generation_with_caches_gives_the_tokens_of_the_public_code(tmp_path, name):
    original = checkpoint(tmp_path / "hf", name)
    commands.main(["convert", str(tmp_path / "hf"), str(tmp_path / "ours")])
    engine = DepthBatchingEngine(
        load_model(tmp_path / "ours").eval(), CacheSettings(1 << 14, max_length=32)
    )
    prompts: tuple[tuple[int, ...], ...] = ((1, 5, 3), (7, 2))
    tokens: dict[int, list[int | None]] = {}
    for prompt in prompts:
        engine.submit(Request(prompt, max_new_tokens=6))
    for event in engine.run():
        tokens.setdefault(event.number, []).append(event.token)
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, original(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert list(tokens.values())[number] == ids[0, len(prompt) :].tolist()


def test_parameters_flops_and_latent_rows_are_counted() -> None:
    kind, fields = CHECKPOINTS["V3"]
    config = config_from_deepseek(kind(**SIZES | fields).to_dict())
    model, length = small_model(config), 9
    measured, cost = measure(model, random_ids(BATCH, length)), account(config, length)
    assert cost.parameters.total == sum(p.numel() for p in model.parameters())
    assert measured.forward == BATCH * cost.forward.total
    assert measured.training == BATCH * cost.training.total
    # Of each token and layer, a latent row and the rotary part of the keys.
    assert cost.kv_bytes(4) == length * 4 * (8 + 4) * 4


def with_settings(**changes) -> dict[str, Any]:
    kind, fields = CHECKPOINTS["V3"]
    return kind(**SIZES | fields).to_dict() | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 40}}, "rope_type='dynamic'"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "YarnScaling.factor=0.5 must be at"),
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ({"n_shared_experts": None}, "n_shared_experts=None"),
        ({"kv_lora_rank": "8"}, "kv_lora_rank='8' must be an integer"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": False, "scoring_func": "softmax",
          "topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ({"model_type": "kimi_linear"}, "model_type='kimi_linear'"),
    ],
)  # fmt: skip
def test_settings_that_ours_do_not_have_are_refused_by_name(changes, reason):
    with pytest.raises(ValueError, match=reason):
        config_from_deepseek(with_settings(**changes))


def with_heads(folder: Path, count: int) -> MtpModel:
    """Layers of multi-token prediction with random weights, saved as released checkpoints have them."""
    main = checkpoint(folder, "V3, YaRN")
    heads = randomized(MtpModel(main, count)).eval()
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():  # which are those of the model, and were drawn anew
        heads.embed_tokens.weight.copy_(tensors["model.embed_tokens.weight"])
        heads.shared_head.weight.copy_(tensors["lm_head.weight"])
    shared = ("embed_tokens.", "shared_head.", "rotary_emb.")
    for name, tensor in heads.state_dict().items():
        if name.startswith(shared):
            continue
        _, layer, rest = name.split(".", 2)
        place = f"model.layers.{int(layer) + SIZES['num_hidden_layers']}"
        rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        if rest.startswith("mlp.experts."):  # transformers holds all experts in one tensor
            for expert, part in enumerate(tensor):
                if rest.endswith("gate_up_proj"):
                    halves = zip(("gate_proj", "up_proj"), part.chunk(2), strict=True)
                else:
                    halves = zip(("down_proj",), (part,), strict=True)
                for projection, weight in halves:
                    tensors[f"{place}.mlp.experts.{expert}.{projection}.weight"] = weight.clone()
        else:
            tensors[f"{place}.{rest}"] = tensor
        tensors[f"{place}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{place}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": count}))
    return heads


def test_layers_of_multi_token_prediction_are_heads_and_come_back_bit_for_bit(tmp_path):
    theirs = with_heads(tmp_path / "hf", 2)
    commands.main(["convert", str(tmp_path / "hf"), str(tmp_path / "ours")])
    to = ["--to", "deepseek_v3"]
    commands.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), *to])
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "back"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (
        json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 2
    )
    model, ids = load_model(tmp_path / "ours").eval(), random_ids(2, 9)
    states = torch.randn(2, 9, SIZES["hidden_size"])
    places = torch.arange(9).expand(2, 9)
    cache = MtpCache(config=theirs.config)
    with torch.no_grad():
        wanted, found = states, states.transpose(0, 1)
        for layer, head in enumerate(model.prediction_heads):
            wanted = theirs.forward_layer(layer, wanted, places, cache, input_ids=ids)
            context = StepContext(0, Tokens.whole_sequence(9, 2))
            found = head(found, model.embedding(ids.T), context)
            torch.testing.assert_close(found.transpose(0, 1), wanted, rtol=1e-5, atol=1e-5)


def test_a_copy_that_differs_is_refused(tmp_path, capsys):
    with_heads(tmp_path / "hf", 1)
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.4.embed_tokens.weight"][0] += 1
    save_file(tensors, path)
    with pytest.raises(SystemExit):
        commands.main(["convert", str(tmp_path / "hf"), str(tmp_path / "ours")])
    assert "'model.layers.4.embed_tokens.weight' differs from" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [5, 3]}
"""Whose last blocks are cut, as those of the released latent rows (576 = 4.5 · 128) are."""


def in_fp8(
    folder: Path, sizes: tuple[int, int] | None = None, **changes: Any
) -> dict[str, torch.Tensor]:
    """Quantize the matrices of the layers as released checkpoints have them.

    Returns:
        What the checkpoint then stands for, number by number.
    """
    rows, columns = sizes or BLOCKS["weight_block_size"]
    tensors, meant = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        meant[name] = tensors[name] = tensor.to(torch.bfloat16)
        if tensor.dim() < 2 or not re.search(r"_proj|self_attn", name):
            continue  # embedding, output, norms and routers stay as they are
        stored = torch.zeros_like(tensor, dtype=torch.float8_e4m3fn)
        scales = torch.zeros(-(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns))
        meant[name] = torch.zeros_like(tensor, dtype=torch.bfloat16)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scales[i, j] = tensor[block].abs().max() / 448
                stored[block] = (tensor[block] / scales[i, j]).to(torch.float8_e4m3fn)
                meant[name][block] = (stored[block].float() * scales[i, j]).to(torch.bfloat16)
        tensors |= {name: stored, f"{name}_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    given = values | {"quantization_config": BLOCKS | changes, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(given))
    return meant


def test_weights_in_fp8_are_read_as_what_they_stand_for(tmp_path):
    with_heads(tmp_path / "hf", 1)
    meant = in_fp8(tmp_path / "hf")
    commands.main(["convert", str(tmp_path / "hf"), str(tmp_path / "ours")])
    to = ["--to", "deepseek_v3"]
    commands.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), *to])
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(meant)
    assert all(torch.equal(back[name], meant[name]) for name in meant)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_weights_in_fp8_are_what_transformers_makes_of_them(tmp_path):
    checkpoint(tmp_path / "hf", "V2")
    in_fp8(tmp_path / "hf", (4, 4), weight_block_size=[4, 4])  # transformers cuts no blocks
    commands.main(["convert", str(tmp_path / "hf"), str(tmp_path / "ours")])
    quantization = FineGrainedFP8Config(weight_block_size=(4, 4), dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.bfloat16, quantization_config=quantization
    )
    model, ids = load_model(tmp_path / "ours").float().eval(), random_ids(2, 9)
    with torch.no_grad():
        expected = theirs.float().eval()(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method='gptq' is not supported"),
        ({"weight_block_size": 128}, "weight_block_size=128 must be two positive integers"),
        ({"weight_block_size": [4, 4]}, "and scales of shape .* for blocks of 4"),
    ],
)
def test_other_quantizations_are_refused_by_name(tmp_path, capsys, changes, reason):
    checkpoint(tmp_path / "hf", "V2")
    in_fp8(tmp_path / "hf", **changes)
    with pytest.raises(SystemExit):
        commands.main(["convert", str(tmp_path / "hf"), str(tmp_path / "ours")])
    assert re.search(reason, capsys.readouterr().err)
    assert not (tmp_path / "ours").exists()


LATENT = LatentAttentionConfig(8, 6, 4, 5)
PLAIN = DecoderConfig(19, 16, 24, 4, 4, rms_norm_epsilon=1e-6, latent_attention=LATENT)
EXPERTS = MoEConfig(8, 2, scores="sigmoid", bias_update_rate=0.01, shared_ffn_hidden_size=24)


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        (V3, small_config(), "latent_attention=None"),
        (V3, replace(PLAIN, rms_norm_epsilon=1e-5), "rms_norm_epsilon=1e-05"),
        (V2, replace(PLAIN, recursion=RecursionConfig(2, router=ExpertChoice())), "recursion="),
        (V2, replace(PLAIN, moe=EXPERTS), "moe.scores=sigmoid"),
        (
            V2,
            replace(PLAIN, multi_token_prediction=MultiTokenPrediction()),
            "multi_token_prediction=MultiTokenPrediction",
        ),
        (V3, replace(PLAIN, moe=MoEConfig(8, 2)), "moe.scores=softmax"),
        (V3, replace(PLAIN, moe=replace(EXPERTS, bias_update_rate=0.0)), "bias_update_rate=0.0"),
        (V3, replace(PLAIN, moe=replace(EXPERTS, shared_ffn_hidden_size=10)), "hidden_size=10"),
        (V3, replace(PLAIN, moe=EXPERTS, dense_ends=True), "dense_ends=True"),
    ],
)
def test_models_that_deepseek_does_not_have_are_not_written(family, config, reason):
    with pytest.raises(ValueError, match=f"{reason}.* cannot be written as {family.model_type}"):
        deepseek_config(family, config)
