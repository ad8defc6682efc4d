"""Published looped models in and out: equal logits, and the same tensors after the way back.

`ouro_checkpoint` is a tiny model with random weights, saved by the public modelling code, and
`ouro_recorded.safetensors` has what that code computes: `ids` `[b s]`, `logits.N` `[b s v]` with N
loops, the states after every loop of four, `hidden` `[r b s h]`, and the logits of the exit gate on
them, `gates` `[r b s]`. A Nanbeige is compared with transformers' Llama, whose stack and last norm
run once per loop.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mor_huggingface.checkpoints.looped import (
    NANBEIGE,
    OURO,
    config_from_looped,
    looped_config,
    open_looped,
    write_looped,
)
from mor_layers import MoRTransformer, RecursionConfig, load_model
from mor_layers.cpu_kernels import without_cpu_kernels
from mor_layers.routers import ExitGate
from mor_layers.weights import StoredModel
from mor_tools import commands
from mor_tools.formats import detected

PLACE = Path(__file__).parent
SOURCE = PLACE / "ouro_checkpoint"
RECORDED = load_file(PLACE / "ouro_recorded.safetensors")


@pytest.fixture(autouse=True)
def same_operations():
    """As in the public code: loops multiply the differences of rounding."""
    with without_cpu_kernels():
        yield


def with_settings(folder: Path, **changes) -> Path:
    """A copy of the checkpoint whose config.json differs."""
    target = folder / "changed"
    shutil.copytree(SOURCE, target)
    values = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(values))
    return target


def built(stored: StoredModel) -> MoRTransformer:
    model = MoRTransformer(stored.config)
    model.load_state_dict({name: stored.weights[name] for name in stored.weights})
    return model.eval()


@pytest.mark.parametrize("loops", [2, 3, 4])
def test_logits_are_those_of_the_public_code_at_every_number_of_loops(tmp_path, loops):
    source = with_settings(tmp_path, total_ut_steps=loops)
    assert detected(source).name == "ouro"
    with torch.no_grad():
        logits = built(open_looped(source))(RECORDED["ids"]).logits
    torch.testing.assert_close(logits, RECORDED[f"logits.{loops}"], rtol=1e-5, atol=1e-5)


def test_a_model_comes_back_bit_for_bit_through_our_format(tmp_path):
    commands.main(["convert", str(SOURCE), str(tmp_path / "ours")])
    commands.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "ouro"])
    original, back = (load_file(f / "model.safetensors") for f in (SOURCE, tmp_path / "back"))
    assert set(original) == set(back)
    for name, tensor in original.items():
        assert torch.equal(tensor, back[name]), name
    values, written = (
        json.loads((f / "config.json").read_text()) for f in (SOURCE, tmp_path / "back")
    )
    for name in set(values) - {"rope_theta", "rope_scaling", "attention_dropout", "use_cache",
                               "sliding_window", "use_sliding_window"}:  # fmt: skip
        assert written[name] == values[name], name
    assert written["rope_parameters"]["rope_theta"] == values["rope_theta"]
    with torch.no_grad():
        logits = load_model(tmp_path / "ours")(RECORDED["ids"]).logits
    torch.testing.assert_close(logits, RECORDED["logits.4"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_tokens_exit_where_the_published_gate_says(tmp_path, threshold):
    model = built(open_looped(with_settings(tmp_path, early_exit_threshold=threshold)))
    gates = RECORDED["gates"].sigmoid()
    has_exited = 1 - (1 - gates).cumprod(dim=0) >= threshold  # [r b s]
    has_exited[-1] = True
    expected = has_exited.long().argmax(dim=0) + 1
    with torch.no_grad():
        output = model(RECORDED["ids"])
    # A token that left earlier is not seen by deeper steps of later ones: the first token of a
    # sequence, which sees nothing else, is what must agree exactly.
    assert torch.equal(output.depths[:, 0], expected[:, 0])
    state = RECORDED["hidden"].gather(
        0, (expected[:, 0] - 1)[None, :, None, None].expand(1, -1, 7, 16)
    )[0, :, 0]
    logits = state @ model.output.weight.T
    torch.testing.assert_close(output.logits[:, 0], logits, rtol=1e-5, atol=1e-5)


def test_in_training_all_tokens_run_all_steps(tmp_path):
    model = built(open_looped(with_settings(tmp_path, early_exit_threshold=0.1))).train()
    assert (model(RECORDED["ids"]).depths == 4).all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"total_ut_steps": 1}, "total_ut_steps=1"),
        ({"total_ut_steps": "4"}, "total_ut_steps='4'"),
        ({"early_exit_step": 2}, "early_exit_step=2"),
        ({"early_exit_threshold": "x"}, "early_exit_threshold='x'"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type='dynamic'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_settings_that_cannot_be_expressed_are_refused_by_name(changes, told):
    values = json.loads((SOURCE / "config.json").read_text()) | changes
    with pytest.raises(ValueError, match=rf"config\.json: {told}"):
        config_from_looped(values)


def test_what_is_no_ouro_is_refused_by_name(tmp_path):
    stored = open_looped(SOURCE)
    config = stored.config
    plain = replace(config, recursion=RecursionConfig(4, "cycle"))
    for wrong, told in (
        (plain, "router=FixedDepth()"),
        (plain, "loop_norm=False"),
        (replace(config, recursion=replace(config.recursion, prelude_layers=4)), "prelude_layers=4"),
        (replace(config, qkv_bias=True), "qkv_bias=True"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="cannot be written as ouro") as refused:
            looped_config(OURO, wrong)
        assert told in str(refused.value)
    weights = {name: stored.weights[name] for name in stored.weights}
    weights["recursions.0.step_input.norms.0"] = weights["norm.weights.0"] + 1
    with pytest.raises(ValueError, match="differs from norm"):
        write_looped(OURO, replace(stored, weights=weights), tmp_path)
    with pytest.raises(ValueError, match=r"ExitGate\.threshold=0\.0"):
        ExitGate(0.0)


@pytest.fixture
def nanbeige(tmp_path) -> Path:
    """A tiny Nanbeige with random weights, which are those of a Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 7e7},
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if is_norm else 0.5) + is_norm)
    folder = tmp_path / "nanbeige"
    model.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "nanbeige", "architectures": ["NanbeigeForCausalLM"], "num_loops": 3}
    (folder / "config.json").write_text(json.dumps(values | {"skip_loop_final_norm": False}))
    return folder


@pytest.mark.parametrize("loops", [2, 3])
def test_a_nanbeige_computes_what_a_looped_llama_does(nanbeige, tmp_path, loops):
    from transformers import LlamaForCausalLM

    values = json.loads((nanbeige / "config.json").read_text()) | {"num_loops": loops}
    (nanbeige / "config.json").write_text(json.dumps(values))
    commands.main(["convert", str(nanbeige), str(tmp_path / "ours")])
    commands.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "nanbeige"])
    original, back = (load_file(f / "model.safetensors") for f in (nanbeige, tmp_path / "back"))
    assert original.keys() == back.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in original.items())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["model_type"], written["num_loops"]) == ("nanbeige", loops)
    as_llama = values | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (nanbeige / "config.json").write_text(json.dumps(as_llama))
    llama = LlamaForCausalLM.from_pretrained(nanbeige, dtype=torch.float32).eval()
    with torch.no_grad():
        states = llama.model.embed_tokens(RECORDED["ids"])
        for _ in range(loops):
            states = llama.model(inputs_embeds=states, use_cache=False).last_hidden_state
        expected = llama.lm_head(states)
        logits = load_model(tmp_path / "ours")(RECORDED["ids"]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_other_kinds_of_nanbeige_are_refused_by_name(nanbeige):
    values = json.loads((nanbeige / "config.json").read_text())
    for name in (
        "skip_loop_final_norm",
        "enable_hyper_connection",
        "loop_share_kv",
        "qk_layernorm",
    ):
        with pytest.raises(ValueError, match=f"{name}=True is not supported, only False"):
            config_from_looped(values | {name: True})
    with pytest.raises(ValueError, match="num_loops=1 must be"):
        config_from_looped(values | {"num_loops": 1})
    recursion = RecursionConfig(3, "cycle", loop_norm=True, sandwich_norms=True)
    sandwich = replace(config_from_looped(values), recursion=recursion)
    with pytest.raises(ValueError, match="sandwich_norms=True cannot be written as nanbeige"):
        looped_config(NANBEIGE, sandwich)


@pytest.mark.parametrize("kind", ["dory", "hrm_text"])
def test_looped_models_that_our_blocks_do_not_express_are_refused_by_name(tmp_path, kind, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(SystemExit):
        commands.main(["convert", str(tmp_path), str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert f"model_type='{kind}' cannot be converted" in told
    assert "ouro, nanbeige" in told
