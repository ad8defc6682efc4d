"""torchtitan's trainer: it trains on several ranks as on one, resumes, and leaves a model folder."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

from mor_layers import DecoderConfig
from mor_layers.models import MultiTokenPrediction
from mor_layers.weights import load_model
from mor_titan.folders import save_folder
from tests.mor_titan.decoders import DECODERS

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 5, 4  # an odd number, because a bias may go up and down again
SAVED_AT = 3


@dataclass(frozen=True)
class Layout:
    """Ranks, and how the model and its batches are divided over them."""

    ranks: int
    replicate: int = 1
    tensor_parallel: int = 1

    @property
    def options(self) -> list[str]:
        """Flags of torchtitan."""
        replicas = self.ranks // self.tensor_parallel
        return [
            f"--training.local_batch_size={BATCH // replicas}",
            f"--parallelism.data_parallel_replicate_degree={self.replicate}",
            f"--parallelism.tensor_parallel_degree={self.tensor_parallel}",
        ]


ONE = Layout(1)
TENSOR_PARALLEL = Layout(2, tensor_parallel=2)
LAYOUTS = {
    "FSDP2": Layout(2),
    "tensor parallelism": TENSOR_PARALLEL,
    "FSDP2 and tensor parallelism": Layout(4, tensor_parallel=2),
    "HSDP": Layout(4, replicate=2),
    "replicas and tensor parallelism": Layout(4, replicate=2, tensor_parallel=2),
}


@dataclass(frozen=True)
class Run:
    """What a run of the trainer left."""

    losses: dict[int, float]
    """Of each step, from TensorBoard."""
    validation: dict[int, float]
    """Validation losses, of the same batch where data is not parallel."""
    state: dict[str, Tensor]
    """Parameters and buffers of the model folder."""


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


@pytest.fixture(scope="module")
def alone(
    assets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Run, Path]]:
    """Of a config: what one rank trains, and the folder of that run."""

    @cache
    def run(config: str) -> tuple[Run, Path]:
        target = tmp_path_factory.mktemp(config)
        return trained(assets, target, config, ONE), target

    return run


def train(
    assets: Path,
    target: Path,
    config: str,
    layout: Layout,
    *options: str,
    module: str = "tests.mor_titan.configs",
) -> subprocess.CompletedProcess[str]:
    """A run of torchtitan under torchrun."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(layout.ranks), "-m", "mor_titan.on_cpu"),
        *("--module", module, "--config", config, "--hf_assets_path", str(assets)),
        *("--dump_folder", str(target), "--training.steps", str(STEPS), *layout.options),
        *("--training.mixed_precision_param", "float32"),
        *("--training.global_batch_size", str(BATCH), "--metrics.enable_tensorboard"),
        *("--checkpoint.enable", "--checkpoint.interval", str(SAVED_AT)),
        *("--validator.enable", "--validator.freq", str(STEPS), "--validator.steps", "1"),
        *("--validator.dataloader.dataset", "python_topics", *options),
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


def trained(assets: Path, target: Path, config: str, layout: Layout, *options: str) -> Run:
    """What a run left, after the trainer finished without an error."""
    run = train(assets, target, config, layout, *options)
    assert run.returncode == 0, run.stdout[-6000:]
    (events,) = target.rglob("events.out.tfevents.*")
    written = EventAccumulator(str(events)).Reload()
    losses, validation = (
        {event.step: event.value for event in written.Scalars(tag)}
        for tag in ("loss_metrics/global_avg_loss", "validation_metrics/loss")
    )
    step, folder = target / "checkpoint" / f"step-{STEPS}", target / "model"
    save_folder(step, folder, DECODERS[config], assets / "tokenizer.json")
    return Run(losses, validation, load_model(folder).state_dict())


def assert_trained_alike(run: Run, expected: Run, layout: Layout) -> None:
    assert run.losses == pytest.approx({n: expected.losses[n] for n in run.losses}, abs=1e-5)
    assert run.validation.keys() >= {STEPS}
    if layout.tensor_parallel == layout.ranks:  # otherwise ranks validate with other rows
        wanted = {step: expected.validation[step] for step in run.validation}
        assert run.validation == pytest.approx(wanted, abs=1e-5)
    for name, tensor in run.state.items():
        torch.testing.assert_close(tensor, expected.state[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", DECODERS)
def test_one_rank_learns_and_moves_its_routers(alone, config: str) -> None:
    run, _ = alone(config)
    assert list(run.losses) == [*range(1, STEPS + 1)] and run.losses[STEPS] < run.losses[1]
    moved = {"expert_choice": "training_steps", "experts": "depth_bias"}[config]
    assert run.state[f"recursions.0.router.{moved}"].abs().sum() > 0
    for step, loss in run.validation.items():  # of other rows, and without losses of routers
        assert loss == pytest.approx(run.losses[step], abs=0.3)


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        *(("experts", layout) for layout in LAYOUTS),
        ("expert_choice", "FSDP2"),
        ("expert_choice", "tensor parallelism"),
        ("expert_choice", "FSDP2 and tensor parallelism"),
    ],
)
def test_several_ranks_train_as_one_does(
    assets: Path, tmp_path: Path, alone, config: str, layout: str
) -> None:
    expected, _ = alone(config)
    run = trained(assets, tmp_path, config, LAYOUTS[layout])
    assert len(run.losses) == STEPS
    assert_trained_alike(run, expected, LAYOUTS[layout])


@pytest.mark.parametrize("config", DECODERS)
def test_a_run_of_one_rank_resumes_on_tensor_parallel_ranks(
    assets: Path, tmp_path: Path, alone, config: str
) -> None:
    expected, folder = alone(config)
    saved = Path("checkpoint", f"step-{SAVED_AT}")
    shutil.copytree(folder / saved, tmp_path / saved)
    run = trained(assets, tmp_path, config, TENSOR_PARALLEL)
    assert list(run.losses) == [*range(SAVED_AT + 1, STEPS + 1)]
    assert_trained_alike(run, expected, TENSOR_PARALLEL)


def test_bf16_on_tensor_parallel_ranks_stays_close_to_fp32(
    assets: Path, tmp_path: Path, alone
) -> None:
    layout = LAYOUTS["FSDP2 and tensor parallelism"]
    options = ("--training.mixed_precision_param", "bfloat16")
    run = trained(assets, tmp_path, "expert_choice", layout, *options)
    expected, _ = alone("expert_choice")
    assert run.losses != pytest.approx(expected.losses, abs=1e-5)  # it computed in bf16
    assert run.losses == pytest.approx(expected.losses, abs=0.02)


def test_the_trainer_refuses_what_the_model_does(assets: Path, tmp_path: Path) -> None:
    option = "--parallelism.enable_sequence_parallel"
    run = train(assets, tmp_path, "mor_debugmodel", TENSOR_PARALLEL, option, module="mor_titan")
    assert run.returncode != 0
    assert "ValueError: parallelism.enable_sequence_parallel=True" in run.stdout


def test_what_is_not_supported_is_refused_by_name() -> None:
    degree = "--parallelism.{}_parallel_degree={}"
    tensor_parallel = degree.format("tensor", 2)
    expected = {
        degree.format("pipeline", 2): "parallelism.pipeline_parallel_degree=2 is not supported",
        degree.format("context", 2): "parallelism.context_parallel_degree=2 is not supported",
        degree.format("expert", 2): "parallelism.expert_parallel_degree=2 is not supported",
        degree.format("tensor", 3): "parallelism.tensor_parallel_degree=3 does not divide all of",
        f"{tensor_parallel} --parallelism.enable_sequence_parallel": "enable_sequence_parallel=True",
        "--parallelism.spmd_backend=spmd_types": "parallelism.spmd_backend='spmd_types'",
        "--compile.enable": "compile.enable is not supported",
        "--training.no-disable_cuda_graphs": "CUDA graphs need fixed shapes",
        tensor_parallel: None,
    }
    command = [sys.executable, "-m", "tests.mor_titan.refusals", *expected]
    run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    reasons = json.loads(run.stdout.splitlines()[-1])
    for reason, part in zip(reasons, expected.values(), strict=True):
        assert reason is None if part is None else part in reason, reason


def test_heads_of_multi_token_prediction_are_refused_by_name() -> None:
    from mor_titan.model import MoRModel

    heads = MultiTokenPrediction()
    config = MoRModel.Config.from_decoder(
        DecoderConfig(32, 16, 24, 2, 2, multi_token_prediction=heads)
    )
    assert config.decoder_config.multi_token_prediction == heads
    with pytest.raises(ValueError, match="multi_token_prediction is not trained by torchtitan"):
        config.update_from_config(config=SimpleNamespace(debug=SimpleNamespace(seed=0)))
