"""Small runs of the pretraining script: on ranks of the worker pool, which have Megatron loaded."""

import contextlib
import io
import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[3]
TINY = str(ROOT / "examples" / "configs" / "tiny.yaml")
SMALL = [
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_unrolled_layers=6",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.moe.ffn_hidden_size=32",
    "recursion.num_recursions=2",
    "recursion.router.warmup_steps=4",
    "parallel.tensor=1",
    "parallel.sequence_parallel=false",
    "parallel.distributed_optimizer=true",
    "data.vocabulary_size=300",
    "data.sequence_length=32",
    "data.held_out_share=0.2",
    "training.steps=4",
    "training.warmup_steps=1",
    "training.decay_steps=2",
    "training.global_batch_size=4",
    "training.micro_batch_size=1",
    "training.checkpoint_every=100",
    "evaluation.every=2",
    "evaluation.batches=1",
    "evaluation.sample_tokens=3",
    "log_every=2",
]
"""Changes that make the run of tiny.yaml a small one on one process, of four steps."""


def write_text(folder: Path) -> list[str]:
    """Settings that name a small text, which is written into `folder`."""
    lines = (json.dumps({"text": f"document {i}: " + "red blue " * (i % 4 + 2)}) for i in range(90))
    (folder / "text.jsonl").write_text("\n".join(lines))
    return [f"data.path={folder}/text.jsonl", f"data.prepared_folder={folder}/prepared"]


def resume_on_rank(*, folder: str) -> str:
    """Resume the run of `folder`/tiny.yaml, whose paths are relative to that folder."""
    with contextlib.chdir(folder):
        return pretrain_on_rank(arguments=["--config", "tiny.yaml"])


@contextlib.contextmanager
def without_drawings() -> Iterator[None]:
    """Reports name their figures but do not draw them, which takes as long as a small run's steps."""
    from mor_tools.pretraining.reporting import report

    drawn = report.svg
    report.svg = lambda figure, description: f'<figure aria-label="{description}"></figure>'
    try:
        yield
    finally:
        report.svg = drawn


def pretrain_on_rank(
    *, settings: Sequence[str] = (), arguments: list[str] | None = None, draws: bool = False
) -> str:
    """The script's work on a rank of the pool, and what it printed; run it with `pool.run`.

    Args:
        settings: changes to the small run.
        arguments: the whole command line, instead of the small run's.
        draws: whether the report's figures are drawn.
    """
    from mor_megatron.platform import cpu
    from mor_tools.pretraining import distributed
    from mor_tools.pretraining.command_line import load_settings
    from mor_tools.pretraining.session import pretrain

    os.environ["RANK"] = str(torch.distributed.get_rank())
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    cpu.enable()
    read = load_settings(arguments or ["--config", TINY, *SMALL, *settings])
    read.data_parallel_size(distributed.world_size())
    drawings = contextlib.nullcontext() if draws else without_drawings()
    try:
        with (
            distributed.model_parallel(read),
            drawings,
            contextlib.redirect_stdout(io.StringIO()) as printed,
        ):
            pretrain(read)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return printed.getvalue()


def continued(folder: Path, copy: Path) -> str:
    """The setting under which a run goes on in a copy of `folder`."""
    shutil.copytree(folder, copy)
    return f"output={copy}"


def history(folder: Path) -> list[dict[str, Any]]:
    """What a run noted of each step, but for its speed."""
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    for row in rows:
        del row["tokens_per_second"]  # the only thing that depends on the clock
    return rows


def assert_same_curves(folder: Path, other: Path) -> None:
    """The runs took the same steps: losses, gradient norms and routing, to 1e-5."""
    rows, others = history(folder), history(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, of_other in zip(rows, others, strict=True):
        assert _numbers(row) == pytest.approx(_numbers(of_other), rel=1e-5, abs=1e-5), row["step"]


def _numbers(values: Any, name: str = "") -> dict[str, float]:
    """All numbers in nested mappings and lists, by where they stand."""
    if isinstance(values, int | float):
        return {name: values}
    parts = values.items() if isinstance(values, dict) else enumerate(values or ())
    return {k: v for key, part in parts for k, v in _numbers(part, f"{name}.{key}").items()}
