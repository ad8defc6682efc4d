"""Models go from files into Megatron checkpoints and back, whatever layout saves or loads them."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    MoRTransformer,
    RecursionConfig,
    Relaxation,
    save_model,
)
from mor_layers.weights import StoredModel, open_model, recursive_weights
from mor_megatron.checkpoints import describe, load_tensors, megatron_view, open_checkpoint, runs
from mor_megatron.checkpoints.models import write_checkpoint
from mor_tools.commands import main
from mor_tools.formats.published_files import open_published
from tests.distributed import megatron_setup as setup
from tests.distributed.checkpoints.test_weights import MODELS, gpt, logits_through_stages
from tests.distributed.pool import WorkerPool
from tests.mor_layers.small_models import randomized
from tests.reference_cases import published_parameters

CASES = sorted((Path(__file__).parents[2] / "reference").glob("*.json"))
# Without recursion, and with each sharing of layers and each router that has weights of its own.
DAILY_CASES = (
    "expert_choice_cycle_r2_tanh_mlp_aux_router",
    "recursive_middle_cycle_r3_unshared_norm",
    "recursive_middle_sequence_r3",
    "token_choice_middle_cycle_r2_sigmoid_loss_free",
    "vanilla",
)
LAYOUTS: dict[str, tuple[dict[str, Any], bool]] = {
    "tp+sp": ({"tp": 2}, True),
    "pp": ({"pp": 2}, False),
    "ep": ({"ep": 2}, False),
}
VOCABULARY = 61  # which Megatron pads


def decoder_of(name: str) -> DecoderConfig:
    return DecoderConfig(VOCABULARY, 32, 64, num_unrolled_layers=8, num_heads=4, **MODELS[name])


def resave(source: Path, target: Path, layout: dict[str, Any], sp: bool) -> float:
    """Load a checkpoint in a layout, save it there, and compare logits with the torch model's."""
    setup.initialize(**layout)
    stored = open_checkpoint(source)
    model = gpt(replace(stored.config, vocab_size=128), sp)
    runs.load(source, [model])
    runs.save(target, 7, [model], extra=describe(stored.config, stored.facts))
    same_on_all = torch.Generator().manual_seed(0)
    ids = torch.randint(stored.config.vocab_size, (2, 12), generator=same_on_all)
    ours = MoRTransformer(stored.config).eval()
    weights = dict(stored.weights)
    weights.setdefault("output.weight", weights["embedding.weight"])  # where they are tied
    ours.load_state_dict(weights)
    # Routed as in training, which every layout must do alike.
    with torch.no_grad():
        logits = logits_through_stages(model, ids)
        expected = ours(ids).logits
    if logits is None:
        return 0.0
    assert not logits[..., stored.config.vocab_size :].any()
    return (logits[..., : stored.config.vocab_size] - expected).abs().max().item()


def assert_same(first: StoredModel, second: StoredModel) -> None:
    assert first.config == second.config
    assert list(first.weights) and set(first.weights) == set(second.weights)
    for name in first.weights:
        assert torch.equal(first.weights[name], second.weights[name]), name


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("Qwen's", "tp+sp"),
        ("experts", "ep"),
        ("all helps", "tp+sp"),
        pytest.param("an expert router a step", "tp+sp", marks=pytest.mark.full),
        pytest.param("depth and width", "ep", marks=pytest.mark.full),
        pytest.param("per-step norms", "pp", marks=pytest.mark.full),
        pytest.param("one by one", "pp", marks=pytest.mark.full),
        pytest.param("no recursion", "pp", marks=pytest.mark.full),
        pytest.param("dense ends", "pp", marks=pytest.mark.full),
    ],
)
def test_any_layout_loads_what_one_process_wrote_and_the_way_back(
    pool: WorkerPool, tmp_path: Path, model: str, layout: str
) -> None:
    config = decoder_of(model)
    save_model(randomized(MoRTransformer(config)), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "written", "megatron")
    parallel, sp = LAYOUTS[layout]
    found = pool.run(
        resave,
        2,
        source=tmp_path / "written",
        target=tmp_path / "saved",
        layout=parallel,
        sp=sp,
    )
    assert max(found) < 1e-4
    stored = open_checkpoint(tmp_path / "saved")
    assert_same(stored, open_model(tmp_path / "ours"))
    convert(tmp_path / "saved", tmp_path / "again", "mor")
    assert_same(open_model(tmp_path / "again"), open_model(tmp_path / "ours"))


def convert(source: Path, target: Path, to: str, *options: str) -> None:
    main(["convert", str(source), str(target), "--to", to, *options])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.stem, marks=() if c.stem in DAILY_CASES else pytest.mark.full)
        for c in CASES
    ],
)
def test_published_runs_go_through_every_format_and_come_back_bit_for_bit(
    tmp_path: Path, case: Path
) -> None:
    way = [case, tmp_path / "ours", tmp_path / "megatron", tmp_path / "again", tmp_path / "back"]
    for source, target, to in zip(
        way, way[1:], ("mor", "megatron", "mor", "published"), strict=False
    ):
        convert(source, target, to, *(["--no-verify"] if to == "mor" else []))
    assert_same(open_model(tmp_path / "ours"), open_model(tmp_path / "again"))
    before = published_parameters(load_file(case.with_suffix(".safetensors")))
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert open_published(tmp_path / "back").config == open_published(case).config


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_comes_back_from_two_ranks(pool: WorkerPool, tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    llama = randomized(LlamaForCausalLM(sizes)).eval()
    llama.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "hf", tmp_path / "torch", "mor")
    convert(tmp_path / "torch", tmp_path / "megatron", "megatron")
    run = {"source": tmp_path / "megatron", "target": tmp_path / "two", "layout": {"tp": 2}}
    assert max(pool.run(resave, 2, **run, sp=True)) < 1e-4
    convert(tmp_path / "two", tmp_path / "back", "llama")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    ids = torch.randint(VOCABULARY, (2, 9))
    assert torch.equal(again(ids).logits, llama(ids).logits)
    assert again.config.eos_token_id == 2
    assert (tmp_path / "megatron" / "tokenizer.json").exists()


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.full), "dora"])
def test_a_relaxed_llama_of_full_rank_is_the_dense_one_on_two_ranks(
    pool: WorkerPool, tmp_path: Path, kind: str
) -> None:
    dense = randomized(MoRTransformer(DecoderConfig(VOCABULARY, 32, 64, 8, 4, 2))).eval()
    save_model(dense, tmp_path / "dense")
    relaxed = ["--recursions", "3", "--init", "lower", "--relax-rank", "32", "--relax-kind", kind]
    convert(tmp_path / "dense", tmp_path / "relaxed", "megatron", *relaxed)
    run = {"source": tmp_path / "relaxed", "target": tmp_path / "two", "layout": {"tp": 2}}
    assert max(pool.run(resave, 2, **run, sp=True)) < 1e-4
    convert(tmp_path / "two", tmp_path / "back", "mor")
    back = open_model(tmp_path / "back")
    assert back.config.recursion == RecursionConfig(
        3, share_norms=False, relaxation=Relaxation(32, kind)
    )
    ours = MoRTransformer(back.config).eval()
    ours.load_state_dict(dict(back.weights))
    ids = torch.randint(VOCABULARY, (2, 9))
    torch.testing.assert_close(ours(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    save_model(randomized(MoRTransformer(decoder_of("dense"))), tmp_path / "ours")
    folder = tmp_path / "megatron"
    folder.mkdir()
    write_checkpoint(open_model(tmp_path / "ours"), folder)
    return folder


def damage(folder: Path, change: Any) -> None:
    path = folder / "step_00000000" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def refused(folder: Path, capsys: Any) -> str:
    target = folder.with_name("new")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        convert(folder, target, "mor")
    assert sorted(p.name for p in folder.parent.iterdir()) == ["megatron", "ours"]
    return capsys.readouterr().err.splitlines()[-1]


def test_damage_is_named_by_file_and_tensor_and_leaves_nothing(written: Path, capsys: Any) -> None:
    data = written / "step_00000000" / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:5000])
    told = refused(written, capsys)
    assert "__0_0.distcp is truncated" in told and "tensor 'embedding.word" in told
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    metadata = pickle.loads((written / "step_00000000" / ".metadata").read_bytes())
    (info,) = (i for index, i in metadata.storage_data.items() if index.fqn == name)
    middle = info.offset + info.length // 2
    data.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    told = refused(written, capsys)
    assert f"__0_0.distcp, tensor {name!r}: damaged" in told
    data.unlink()
    assert "__0_0.distcp is missing" in refused(written, capsys)
    data.write_bytes(whole)

    damage(written, lambda m: m.state_dict_metadata.pop(name))
    assert f"has no tensor {name!r}" in refused(written, capsys)
    (written / "step_00000000" / ".metadata").write_bytes(pickle.dumps(print))
    assert "builtins.print is not part of a checkpoint's metadata" in refused(written, capsys)
    (written / "latest").write_text("step_00000009")
    assert "latest names step_00000009, which is not a complete checkpoint" in refused(
        written, capsys
    )


def test_a_checkpoint_that_says_no_model_takes_settings(
    pool: WorkerPool, written: Path, capsys: Any, tmp_path: Path
) -> None:
    pool.run(save_without_description, source=written, target=tmp_path / "bare")
    with pytest.raises(SystemExit, match="2"):
        convert(tmp_path / "bare", tmp_path / "new", "mor")
    assert "--settings FILE.yaml" in capsys.readouterr().err
    settings = tmp_path / "decoder.yaml"
    settings.write_text(
        f"{{vocab_size: {VOCABULARY}, hidden_size: 32, ffn_hidden_size: 64, num_heads: 4, "
        "num_unrolled_layers: 8, recursion: {num_recursions: 3, router: {type: expert_choice}}}"
    )
    convert(tmp_path / "bare", tmp_path / "new", "mor", "--settings", str(settings))
    assert_same(open_model(tmp_path / "new"), open_model(tmp_path / "ours"))


def save_without_description(source: Path, target: Path) -> None:
    setup.initialize()
    stored = open_checkpoint(source)
    model = gpt(replace(stored.config, vocab_size=64), False)
    load_tensors([model], megatron_view(stored.weights, stored.config))
    runs.save(target, 3, [model])


def test_a_recursive_model_is_compared_with_what_it_was_made_into(tmp_path: Path) -> None:
    dense = replace(decoder_of("dense"), recursion=None)
    save_model(randomized(MoRTransformer(dense)), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "two", "megatron", "--recursions", "3")
    expected, weights = recursive_weights(
        open_model(tmp_path / "ours").weights, dense, RecursionConfig(3), "average"
    )
    assert_same(open_checkpoint(tmp_path / "two"), StoredModel(expected, weights))


def test_a_model_that_computes_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    config = replace(decoder_of("dense"), recursion=RecursionConfig(3, router=ExpertChoice()))
    save_model(randomized(MoRTransformer(config)), tmp_path / "ours")
    monkeypatch.setattr(
        "mor_megatron.checkpoints.models.megatron_view",
        lambda weights, config: {n: 2 * t for n, t in megatron_view(weights, config).items()},
    )
    with pytest.raises(SystemExit, match="2"):
        convert(tmp_path / "ours", tmp_path / "new", "megatron")
    assert "computes other logits" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    convert(tmp_path / "ours", tmp_path / "new", "megatron", "--no-verify")
    assert open_checkpoint(tmp_path / "new").config == config
