"""torchtitan's trainer: FSDP2 on two ranks trains as one process does, and leaves a model folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import ByteLevelBPETokenizer

from mor_layers import DecoderConfig
from mor_layers.weights import load_model
from mor_titan.folders import save_folder
from tests.mor_titan.decoders import DECODERS

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 5, 4  # an odd number, because a bias may go up and down again


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 2,048 tokens."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("assets")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(topics.values(), 2048, special_tokens=["<|end|>"], show_progress=False)
    bpe._tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return folder


def train(
    assets: Path,
    target: Path,
    config: str,
    ranks: int,
    *options: str,
    module: str = "tests.mor_titan.configs",
) -> subprocess.CompletedProcess[str]:
    """A run of torchtitan under torchrun."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "-m", "mor_titan.on_cpu"),
        *("--module", module, "--config", config, "--hf_assets_path", str(assets)),
        *("--dump_folder", str(target), "--training.steps", str(STEPS)),
        *("--training.mixed_precision_param", "float32"),
        *("--training.global_batch_size", str(BATCH)),
        *("--training.local_batch_size", str(BATCH // ranks)),
        *("--metrics.enable_tensorboard", "--checkpoint.enable", *options),
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


def losses(target: Path) -> list[float]:
    """Of each step, from TensorBoard."""
    (events,) = target.rglob("events.out.tfevents.*")
    written = EventAccumulator(str(events)).Reload()
    return [event.value for event in written.Scalars("loss_metrics/global_avg_loss")]


def trained(assets: Path, target: Path, config: str, ranks: int, decoder: DecoderConfig) -> Path:
    """The model folder of a run."""
    run = train(assets, target, config, ranks)
    assert run.returncode == 0, run.stdout[-6000:]
    step = target / "checkpoint" / f"step-{STEPS}"
    save_folder(step, target / "model", decoder, assets / "tokenizer.json")
    return target / "model"


@pytest.mark.parametrize("config", DECODERS)
def test_two_ranks_train_as_one_does(assets: Path, tmp_path: Path, config: str) -> None:
    one, two = (
        trained(assets, tmp_path / f"{ranks} ranks", config, ranks, DECODERS[config])
        for ranks in (1, 2)
    )
    alone = losses(one.parent)
    assert len(alone) == STEPS and alone[-1] < alone[0]
    assert losses(two.parent) == pytest.approx(alone, abs=1e-5)
    expected = load_model(one).state_dict()
    for name, tensor in load_model(two).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)
    router = load_model(two).recursions[0].router
    moved = {"expert_choice": "training_steps", "experts": "depth_bias"}[config]
    assert getattr(router, moved).abs().sum() > 0


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--parallelism.tensor_parallel_degree=2", "tensor_parallel_degree=2"),
        ("--parallelism.spmd_backend=spmd_types", "spmd_backend='spmd_types'"),
    ],
)
def test_other_parallelism_is_refused_by_name(
    assets: Path, tmp_path: Path, option: str, reason: str
) -> None:
    run = train(assets, tmp_path, "mor_debugmodel", 2, option, module="mor_titan")
    assert run.returncode != 0
    assert f"ValueError: parallelism.{reason}" in run.stdout
