"""`save_hf_pretrained` writes the folder that was read, or a recursive model made from a dense one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mor_huggingface.checkpoints.llama import open_llama
from mor_layers import ExpertChoice, MoRTransformer, RecursionConfig
from mor_layers.weights import load_model, recursive_weights, save_model
from tests.distributed.pool import WorkerPool
from tests.mor_bridge import bridges
from tests.mor_bridge.test_folders import saved, tokenizer

RECURSION = RecursionConfig(3, router=ExpertChoice())
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DENSE = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
}


def save(source: Path, target: Path, tp: int) -> None:
    """A folder into Megatron, and back into another folder."""
    bridges.start(tp=tp)
    from megatron.bridge import AutoBridge

    import mor_bridge  # noqa: F401 registers the bridge

    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.save_hf_pretrained(bridges.build(bridge, tp=tp), target, show_progress=False)


def open_incomplete(source: Path) -> str:
    """What is said of a folder that lacks a tensor."""
    bridges.start()
    from megatron.bridge import AutoBridge

    import mor_bridge  # noqa: F401 registers the bridge

    with pytest.raises(ValueError, match="has no tensor") as refused:
        bridges.build(AutoBridge.from_hf_pretrained(source))
    return str(refused.value)


def uptrain(source: Path, target: Path, expected: Path, tp: int) -> bridges.Found:
    """A dense checkpoint into a recursive Megatron model, which is saved."""
    bridges.start(tp=tp)
    from mor_bridge import recursive_bridge

    bridge = recursive_bridge(source, RECURSION)
    chunks = bridges.build(bridge, tp=tp)
    bridge.save_hf_pretrained(chunks, target, show_progress=False)
    return bridges.compared(bridge, chunks, expected)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_saved_folder_is_the_one_that_was_read(
    pool: WorkerPool, tmp_path: Path, tp: int
) -> None:
    source, target = saved("own attention", tmp_path), tmp_path / "target"
    if tp == 2:  # experts with tensor parallelism need sequence parallelism
        source = saved("all helps", tmp_path)
    pool.run(save, tp, source=source, target=target, tp=tp)
    for name in ("config.json", "tokenizer.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    read, written = (load_file(folder / "model.safetensors") for folder in (source, target))
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in read)
    ids = torch.arange(12)[None]
    assert torch.equal(load_model(target)(ids).logits, load_model(source)(ids).logits)


def test_a_folder_that_lacks_a_tensor_is_refused(pool: WorkerPool, tmp_path: Path) -> None:
    source = saved("dense", tmp_path)
    name = "model.recursions.0.layers.layers.1.mlp.down.weight"
    tensors = load_file(source / "model.safetensors")
    del tensors[name]
    save_file(tensors, source / "model.safetensors")
    (refused,) = pool.run(open_incomplete, source=source)
    assert f"{name!r} (1 are missing)" in refused


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", DENSE)
def test_a_dense_checkpoint_becomes_the_recursive_model_that_mor_convert_makes(
    pool: WorkerPool, tmp_path: Path, kind: str, tp: int
) -> None:
    torch.manual_seed(0)
    build, config = DENSE[kind]
    build(config).save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    assert (
        tmp_path / "dense" / "model.safetensors.index.json"
    ).exists()  # several files become one
    tokenizer(tmp_path).rename(tmp_path / "dense" / "tokenizer.json")
    dense = open_llama(tmp_path / "dense")
    decoder, weights = recursive_weights(dense.weights, dense.config, RECURSION, "stepwise")
    model = MoRTransformer(decoder)
    model.load_state_dict(dict(weights), strict=not decoder.tie_embeddings)
    save_model(model, tmp_path / "expected")
    found = pool.run(
        uptrain,
        tp,
        source=tmp_path / "dense",
        target=tmp_path / "recursive",
        expected=tmp_path / "expected",
        tp=tp,
    )
    assert [f.changed for f in found] == [[]] * tp
    assert max(f.logits for f in found) < 1e-5
    made, expected = load_model(tmp_path / "recursive"), model.state_dict()
    assert made.config == decoder
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.state_dict().items())
    assert json.loads((tmp_path / "recursive" / "config.json").read_text())["model_type"] == "mor"
