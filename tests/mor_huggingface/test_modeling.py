"""AutoModelForCausalLM loads, generates with, trains and saves our models."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import mor_huggingface
from mor_layers import ExpertChoice, RecursionConfig, TokenChoice, load_model, save_model
from tests.mor_layers.small_models import random_ids, small_config, small_model

SEVERAL = (
    RecursionConfig(2, "cycle", ExpertChoice(alpha=0.7), "recursive_sharing", block_layers=1),
    RecursionConfig(2, "middle_cycle", TokenChoice(), block_layers=1),
)


@pytest.fixture(params=["expert_choice", "token_choice", "tied", "several recursions"])
def folder(request, tmp_path):
    router = TokenChoice() if request.param == "token_choice" else ExpertChoice(alpha=0.7)
    config = replace(small_config(router), tie_embeddings=request.param == "tied")
    if request.param == "several recursions":
        config = replace(config, recursion=SEVERAL, num_unrolled_layers=6)
    save_model(small_model(config), tmp_path / "model")
    return tmp_path / "model"


def test_auto_classes_load_and_save_the_folder(folder, tmp_path):
    assert isinstance(AutoConfig.from_pretrained(folder), mor_huggingface.MoRConfig)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    expected = load_model(folder).state_dict()
    for state in (model.model.state_dict(), load_model(tmp_path / "again").state_dict()):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_and_shards(folder, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for buffer in model.buffers():  # no bf16 number
            buffer.copy_(torch.full_like(buffer, 1.2345))
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype=dtype)
    buffers = {name for name, _ in model.named_buffers()}
    assert buffers
    for name, value in model.state_dict().items():
        got = loaded.state_dict()[name]
        assert got.dtype == (value.dtype if name in buffers else dtype)
        assert torch.equal(got, value.to(got.dtype))


def test_generate_continues_as_the_model_itself_does(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = random_ids(2, 5)
    expected = torch.stack(list(load_model(folder).eval().generate(ids, 6)), dim=1)
    result = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(result[:, 5:], expected)


def test_padding_on_the_left_changes_nothing(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = random_ids(1, 5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(8) >= 3).long()[None]
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    moved = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(plain[:, 5:], moved[:, 8:])


def test_trainer_takes_a_step(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in random_ids(4, 8)]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    loss = trainer.train().training_loss
    fresh = load_model(folder).train()
    ids = torch.stack([row["input_ids"] for row in rows])
    labels = torch.cat([ids[:, 1:], torch.full((4, 1), -1)], dim=1)
    output = fresh(ids, labels)
    expected = output.lm_loss + sum(sum(r.losses.values()) for r in output.recursions)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) == len(before)
