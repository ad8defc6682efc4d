"""Megatron-Bridge's own training loop trains a folder, and a recursive model made from a dense one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM

from mor_layers import DecoderConfig, MoRTransformer, RecursionConfig, TokenChoice
from mor_layers.weights import load_model, save_model
from tests.mor_bridge.test_folders import tokenizer
from tests.mor_bridge.train import STEPS

ROOT = Path(__file__).parents[2]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tp+sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "dp": (2, {}),
}


def train(
    source: Path, target: Path, layout: str, is_dense: bool = False
) -> list[dict[str, float]]:
    """The losses and figures of each step."""
    ranks, fields = LAYOUTS[layout]
    settings = {
        "source": str(source),
        "target": str(target),
        "is_dense": is_dense,
        "fields": fields,
    }
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "-m", "tests.mor_bridge.train", json.dumps(settings)),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return json.loads((target / "losses.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose router has a bias that moves after each batch."""
    torch.manual_seed(0)
    recursion = RecursionConfig(3, router=TokenChoice(balancing="loss_free"))
    model = MoRTransformer(DecoderConfig(64, 32, 64, 5, num_heads=4, recursion=recursion))
    place = tmp_path_factory.mktemp("source") / "model"
    save_model(model, place, tokenizer(place.parent))
    return place


@pytest.fixture(scope="module")
def on_one_rank(folder: Path) -> tuple[list[dict[str, float]], Path]:
    """Its training on one rank: what was logged, and the folder of the trained model."""
    target = folder.parent / "one rank"
    return train(folder, target, "one rank"), target


def test_training_learns_and_reports_on_routing(
    on_one_rank: tuple[Any, Path], folder: Path
) -> None:
    steps, target = on_one_rank
    assert len(steps) == STEPS
    assert steps[-1]["lm loss"] < steps[0]["lm loss"]
    assert all(step["recursion step 1 share"] == 1.0 for step in steps)
    assert all(0 < step["recursion step 2 share"] <= 1 for step in steps)
    written = EventAccumulator(f"{target}_tensorboard").Reload()
    shares = [event.value for event in written.Scalars("recursion step 2 share")]
    assert shares == pytest.approx([step["recursion step 2 share"] for step in steps])
    before, after = load_model(folder), load_model(target)
    name = "recursions.0.router.depth_bias"
    assert not torch.equal(before.state_dict()[name], after.state_dict()[name])


@pytest.mark.parametrize("layout", ["tp+sp", "dp"])
def test_two_ranks_train_as_one_does(
    on_one_rank: tuple[Any, Path], folder: Path, tmp_path: Path, layout: str
) -> None:
    expected, trained = on_one_rank
    steps = train(folder, tmp_path / "trained", layout)
    for found, alone in zip(steps, expected, strict=True):
        assert found == pytest.approx(alone, abs=1e-5)
    state, other = (load_model(place).state_dict() for place in (trained, tmp_path / "trained"))
    for name, tensor in state.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-4)


def test_a_dense_llama_is_trained_as_a_recursive_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(
        tmp_path / "dense"
    )
    tokenizer(tmp_path).rename(tmp_path / "dense" / "tokenizer.json")
    steps = train(tmp_path / "dense", tmp_path / "trained", "one rank", is_dense=True)
    assert steps[-1]["lm loss"] < steps[0]["lm loss"]
    trained = load_model(tmp_path / "trained")
    assert trained.config.num_unrolled_layers == 8
    assert trained.recursions[0].router.training_steps == STEPS
