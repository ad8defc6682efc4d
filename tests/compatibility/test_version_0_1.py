"""A run, a checkpoint and a model folder that version 0.1 wrote are read as it read them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mor_layers import load_model
from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import assert_same_curves, resume_on_rank

OLD = Path(__file__).with_name("v0_1")


def test_a_model_folder_computes_what_it_computed():
    model = load_model(OLD / "model").eval()
    expected = load_file(OLD / "outputs.safetensors")
    with torch.no_grad():
        output = model(expected["ids"])
    torch.testing.assert_close(output.logits, expected["logits"], rtol=0, atol=1e-6)
    assert torch.equal(output.depths, expected["depths"])


def test_the_names_of_parameters_stay():
    model = load_model(OLD / "model")
    stored = load_file(OLD / "model" / "model.safetensors")
    assert {f"model.{name}" for name in model.state_dict()} == set(stored)


def test_a_checkpoint_converts_to_the_same_tensors():
    from mor_megatron.checkpoints import open_checkpoint

    found = open_checkpoint(OLD / "run")
    expected = load_file(OLD / "converted_step_2.safetensors")
    assert {f"model.{name}" for name in found.weights} == set(expected)
    for name in found.weights:
        assert torch.equal(found.weights[name], expected[f"model.{name}"]), name


def test_a_run_resumes_with_the_losses_it_would_have_had(pool: WorkerPool, tmp_path):
    for name in ("run", "text.jsonl", "tiny.yaml"):
        source = OLD / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    assert "resumed at step 2 of 4" in pool.run(resume_on_rank, folder=str(tmp_path))[0]
    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copy(OLD / "history_of_whole_run.jsonl", whole / "history.jsonl")
    assert_same_curves(tmp_path / "run", whole)


@pytest.mark.parametrize("router", ["expert_choice", "token_choice", "fixed_depth", "random_depth"])
def test_names_of_routers_stay(router):
    from mor_layers.routers import registered_routers

    assert router in registered_routers()
