"""Uptraining in the pretraining script: where it begins, in which layouts, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mor_huggingface.checkpoints.llama import write_llama
from mor_layers import MoRTransformer, RecursionConfig, load_model, save_model
from mor_layers.training.distillation import logits_divergence
from mor_layers.weights import open_model, recursive_weights
from mor_tools.pretraining.command_line import load_settings
from mor_tools.pretraining.data.text import TextTokenizer
from mor_tools.pretraining.models import teacher
from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import (
    SMALL,
    TINY,
    assert_same_curves,
    continued,
    history,
    pretrain_on_rank,
    write_text,
)

DENSE = ["model.moe=null", "recursion=null"]
LAYOUTS = {
    "TP=2": (2, ["parallel.tensor=2"]),
    "TP=2 + SP": (2, ["parallel.tensor=2", "parallel.sequence_parallel=true"]),
    "PP=2": (2, ["parallel.pipeline=2"]),
    "PP=2, steps as stages": (
        2,
        ["parallel.pipeline=2", "parallel.pipeline_layout=steps_as_stages"],
    ),
    "CP=2": (2, ["parallel.context=2"]),
    "DP=2": (2, []),
    "TP=2 x PP=2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}
IN_SHORT = ("PP=2, steps as stages",)


@pytest.fixture(scope="module")
def dense(pool: WorkerPool, tmp_path_factory) -> tuple[list[str], Path]:
    """Settings of a text and of a student, and the folder of a dense model trained on the text."""
    folder = tmp_path_factory.mktemp("dense")
    text = write_text(folder)
    settings = [*text, *DENSE, f"output={folder / 'run'}", "training.learning_rate=0.03"]
    pool.run(pretrain_on_rank, settings=settings)
    model = folder / "run" / "model"
    return [*text, "model.moe=null", f"data.tokenizer={model}/tokenizer.json"], model


def uptrain(model: Path, *settings: str) -> list[str]:
    return [f"uptrain.teacher={model}", "uptrain.temperature=2", *settings]


@pytest.fixture(scope="module")
def on_one_process(pool: WorkerPool, dense, tmp_path_factory) -> tuple[list[str], Path]:
    """Settings, and an uninterrupted run on one process."""
    text, model = dense
    folder = tmp_path_factory.mktemp("whole")
    settings = [*text, *uptrain(model)]
    pool.run(pretrain_on_rank, settings=[*settings, f"output={folder / 'run'}"])
    return settings, folder / "run"


def first_batch_in_torch(*, settings: list[str]) -> tuple[float, float]:
    """Loss and divergence of the first global batch, from the torch models; runs on a rank."""
    from mor_megatron.platform import cpu
    from mor_tools.pretraining import distributed
    from mor_tools.pretraining.data import datasets
    from mor_tools.pretraining.data.text import TextTokenizer, prepare

    cpu.enable()
    read = load_settings(["--config", TINY, *SMALL, *settings])
    assert read.uptrain is not None and read.recursion is not None
    dense_model = load_model(Path(read.uptrain.teacher))
    config, weights = recursive_weights(
        dense_model.state_dict(),
        dense_model.config,
        read.recursion,
        read.uptrain.initialization,
        read.training.seed,
    )
    student = MoRTransformer(config)
    student.load_state_dict(dict(weights))
    with distributed.model_parallel(read), torch.no_grad():
        text = prepare(read.data)
        tokenizer = TextTokenizer(text.tokenizer, read.data.end_of_document)
        data = datasets.batches(datasets.build_datasets(read, text, tokenizer).train, read)
        pairs = []
        for batch, _ in zip(data, range(read.training.global_batch_size), strict=False):
            given = {"documents": batch["documents"]}
            logits = student(batch["tokens"], **given).logits
            targets = dense_model(batch["tokens"], **given).logits
            # Megatron's vocabulary is filled up, with rows of zeros.
            missing = -logits.shape[-1] % 128
            logits = F.pad(logits, (0, missing))
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
            targets = F.pad(targets, (0, missing), value=-1e9)
            apart = logits_divergence(logits, targets, read.uptrain.temperature).mean()
            pairs.append(torch.stack([loss, apart]))
    loss, apart = torch.stack(pairs).mean(dim=0).tolist()
    return loss, apart


@pytest.mark.parametrize(
    "init", ["stepwise", *(pytest.param(i, marks=pytest.mark.full) for i in ("average", "random"))]
)
def test_a_run_begins_at_the_loss_and_divergence_of_the_torch_models(
    pool, dense, on_one_process, tmp_path, init
):
    settings, folder = on_one_process
    if init != "stepwise":
        folder = tmp_path / "run"
        settings = [*settings, f"uptrain.initialization={init}"]
        pool.run(
            pretrain_on_rank, settings=[*settings, f"output={folder}", "training.stop_after=1"]
        )
    ((loss, divergence),) = pool.run(
        first_batch_in_torch, settings=[*settings, f"output={tmp_path / 'torch'}"]
    )
    row = history(folder)[0]
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["divergence"] == pytest.approx(divergence, rel=1e-4)
    assert divergence > 1e-3


@pytest.mark.parametrize(
    "name",
    [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS],
)
def test_every_layout_takes_the_steps_of_one_process(pool, on_one_process, tmp_path, name):
    settings, whole = on_one_process
    world_size, layout = LAYOUTS[name]
    output = f"output={tmp_path / 'run'}"
    pool.run(pretrain_on_rank, world_size, settings=[*settings, output, *layout])
    assert_same_curves(tmp_path / "run", whole)


def test_a_resumed_run_equals_an_uninterrupted_one_and_saves_no_teacher(
    pool, dense, on_one_process, tmp_path
):
    settings, whole = on_one_process
    started = tmp_path / "started"
    pool.run(pretrain_on_rank, settings=[*settings, f"output={started}", "training.stop_after=2"])
    again = continued(started, tmp_path / "parts")
    (printed,) = pool.run(pretrain_on_rank, settings=[*settings, again])
    assert "resumed at step 2 of 4" in printed
    assert history(tmp_path / "parts") == history(whole)
    text, model = dense
    alone = [*text, f"uptrain.teacher={model}", "uptrain.distillation_coefficient=0"]
    pool.run(pretrain_on_rank, settings=[*alone, f"output={tmp_path / 'alone'}"])
    assert saved(tmp_path / "parts") == saved(tmp_path / "alone")
    rows = history(tmp_path / "alone")
    assert [row["divergence"] for row in rows] == [None] * 4
    assert rows[0]["loss"] == history(whole)[0]["loss"]
    assert rows[3]["loss"] != history(whole)[3]["loss"]


def saved(run: Path) -> list[str]:
    """Names of what the last checkpoint of a run holds."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    step = (run / "checkpoints" / "latest").read_text().strip()
    (folder,) = [p.parent for p in (run / "checkpoints").rglob(".metadata") if step in p.parts[-2]]
    return sorted(FileSystemReader(folder).read_metadata().state_dict_metadata)


def refusal(pool: WorkerPool, *settings: str) -> str:
    with pytest.raises(AssertionError) as caught:
        pool.run(pretrain_on_rank, settings=list(settings))
    return str(caught.value)


def test_a_dense_model_that_does_not_fit_is_answered_with_the_fix(pool, dense, tmp_path):
    text, model = dense
    run = [*text, *uptrain(model), f"output={tmp_path / 'run'}"]
    assert "Set model.ffn_hidden_size=64 model.num_kv_heads=2" in refusal(
        pool, *run, "model.ffn_hidden_size=32", "model.num_kv_heads=4"
    )
    own = [*text[:2], "model.moe=null", "data.vocabulary_size=280", *uptrain(model)]
    answer = refusal(pool, *own, f"output={tmp_path / 'other'}")
    assert "has a vocabulary of" in answer
    assert f"Set data.tokenizer={model}/tokenizer.json" in answer

    renumbered = tmp_path / "renumbered"
    shutil.copytree(model, renumbered)
    content = json.loads((model / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (renumbered / "tokenizer.json").write_text(json.dumps(content))
    assert "assigns other ids to its tokens" in refusal(
        pool, *text, *uptrain(renumbered), f"output={tmp_path / 'third'}"
    )

    stored = open_model(model)
    epsilon = replace(stored.config, rms_norm_epsilon=1e-6)
    save_model(MoRTransformer(epsilon), tmp_path / "epsilon", model / "tokenizer.json")
    assert "Set model.rms_norm_epsilon=1e-06" in refusal(
        pool, *text, *uptrain(tmp_path / "epsilon"), f"output={tmp_path / 'fourth'}"
    )
    recursive = replace(stored.config, recursion=RecursionConfig(2))
    save_model(MoRTransformer(recursive), tmp_path / "recursive", model / "tokenizer.json")
    assert "only a dense model can be made recursive" in refusal(
        pool, *text, *uptrain(tmp_path / "recursive"), f"output={tmp_path / 'fifth'}"
    )


def test_a_llama_teaches_as_the_same_model_in_our_format_does(dense, tmp_path):
    text, model = dense
    llama = tmp_path / "llama"
    llama.mkdir()
    write_llama(open_model(model), llama)
    settings = load_settings(["--config", TINY, *SMALL, *text, *uptrain(llama)])
    tokenizer = TextTokenizer(model / "tokenizer.json", settings.data.end_of_document)
    found, ours = teacher.open_dense(settings, tokenizer), open_model(model)
    assert found.config == ours.config
    for name in ours.weights:
        assert torch.equal(found.weights[name], ours.weights[name]), name


WRONG = {
    "uptrain.temperature=0": "temperature=0.0 must be above 0",
    "uptrain.teacher=''": "uptrain.teacher is empty",
    "uptrain.initialization=best": "use one of stepwise, average, lower, upper, random",
    "uptrain.distillation_coefficient=-1": "must be at least 0",
    "uptrain.distillation_coefficient=0": "temperature=2.0 has no effect",
    "recursion=null": "Set recursion, or uptrain=null",
    "training.initial_weights=folder": "both set the initial weights",
    "uptrain.top_k=3": "unknown setting 'top_k'",
}


@pytest.mark.parametrize(("override", "answer"), WRONG.items(), ids=list(WRONG))
def test_a_wrong_setting_is_answered_with_what_is_allowed(override, answer):
    given = ["--config", TINY, "model.moe=null", *uptrain(Path("dense")), override]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        load_settings(given)
    assert answer in str(caught.value)


def test_experts_are_answered():
    with pytest.raises(ValueError, match=r"Set model\.moe=null"):
        load_settings(["--config", TINY, "uptrain.teacher=dense"])
