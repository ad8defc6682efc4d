"""A run that stops and resumes, in whatever layout, goes on as if it had not stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from mor_megatron.checkpoints import runs
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

Options = dict[str, Any]
Outcome = tuple[list[float], dict[str, Tensor]]

BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_token_dispatcher_type": "alltoall",
}
DISTRIBUTED = {"use_distributed_optimizer": True}
# With overlap there are buckets: three of them, the first with padding at its end.
OVERLAPPED = DISTRIBUTED | {
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "bucket_size": 20000,
}
DENSE = {"num_layers": 4, "ffn_hidden_size": 80}


def build(
    config: Options, ddp: Options, **optimizer: Any
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    model = setup.tiny_gpt(setup.tiny_config(**(DENSE | config)))
    chunks = setup.data_parallel(model, **ddp)
    return chunks, setup.build_optimizer(chunks, weight_decay=0.1, **optimizer)


def train(
    chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, steps: range
) -> Outcome:
    losses = [
        setup.train_step(chunks, optimizer, setup.random_tokens(4, 12, seed=step)) for step in steps
    ]
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return losses, setup.gather_parameters(chunks)


def train_and_save(directory: Path, layout: Options, config: Options, ddp: Options) -> Outcome:
    """Two steps, a checkpoint, and two more steps, of which it returns the outcome."""
    setup.initialize(**layout)
    chunks, optimizer = build(config, ddp)
    train(chunks, optimizer, range(2))
    runs.save(directory, 2, chunks, optimizer)
    return train(chunks, optimizer, range(2, 4))


def load_and_train(directory: Path, layout: Options, config: Options, ddp: Options) -> Outcome:
    """The last two steps of `train_and_save` in a new model."""
    setup.initialize(**layout)
    chunks, optimizer = build(config, ddp)
    restored = runs.load(directory, chunks, optimizer)
    return train(chunks, optimizer, range(restored.step, 4))


@pytest.mark.parametrize("config", [{}, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "ddp",
    [{}, pytest.param(DISTRIBUTED, marks=pytest.mark.full), OVERLAPPED],
    ids=["plain", "distributed", "distributed, overlapped"],
)
def test_a_resumed_run_is_bit_identical_in_the_same_layout(
    pool: WorkerPool, tmp_path: Path, config: Options, ddp: Options
) -> None:
    run = {"directory": tmp_path, "layout": {}, "config": config, "ddp": ddp}
    losses, parameters = pool.run(train_and_save, 2, **run)[0]
    resumed_losses, resumed_parameters = pool.run(load_and_train, 2, **run)[0]
    assert resumed_losses == losses
    for name, parameter in parameters.items():
        assert torch.equal(resumed_parameters[name], parameter), name


@pytest.mark.parametrize(
    ("saved", "loaded", "config", "ddp"),
    [
        pytest.param({"tp": 2}, {}, {}, {}, id="TP to one rank"),
        pytest.param({}, {"tp": 2}, {}, DISTRIBUTED, id="one rank to TP"),
        pytest.param({"pp": 2}, {}, {}, {}, id="PP to one rank", marks=pytest.mark.full),
        pytest.param({"tp": 2}, {"pp": 2, "vpp": 2}, {}, OVERLAPPED, id="TP to interleaved PP"),
        pytest.param({"ep": 2}, {}, MOE, {}, id="EP to one rank", marks=pytest.mark.full),
        pytest.param({}, {"ep": 2}, MOE, DISTRIBUTED, id="one rank to EP"),
    ],
)
def test_a_run_resumes_in_another_layout(
    pool: WorkerPool,
    tmp_path: Path,
    saved: Options,
    loaded: Options,
    config: Options,
    ddp: Options,
) -> None:
    run = {"directory": tmp_path, "config": config, "ddp": ddp}
    losses, parameters = pool.run(train_and_save, 2 if saved else 1, layout=saved, **run)[0]
    resumed = pool.run(load_and_train, 2 if loaded else 1, layout=loaded, **run)[0]
    assert resumed[0] == pytest.approx(losses, abs=1e-6)
    torch.testing.assert_close(resumed[1], parameters, rtol=1e-5, atol=1e-6)


def interrupt_a_save(directory: Path) -> None:
    setup.initialize()
    chunks, optimizer = build({}, {})
    runs.save(directory, 1, chunks, optimizer, extra={"consumed": 7})
    complete_save, written = dist_checkpointing.save, []

    def failing_save(state: Any, path: str) -> None:
        complete_save(state, path)
        written.append(path)
        raise KeyboardInterrupt

    dist_checkpointing.save = failing_save
    try:
        with pytest.raises(KeyboardInterrupt):
            runs.save(directory, 2, chunks, optimizer)
    finally:
        dist_checkpointing.save = complete_save
    assert Path(written[0]).exists()
    assert runs.latest_step(directory) == 1
    with pytest.raises(FileNotFoundError, match=r"no step_00000002 in .*only \['step_00000001'\]"):
        runs.load(directory, chunks, step=2)
    restored = runs.load(directory, chunks, optimizer)
    assert restored == runs.Restored(step=1, extra={"consumed": 7})

    runs.save(directory, 2, chunks, optimizer, extra={"consumed": 8})
    runs.save(directory, 2, chunks, optimizer, extra={"consumed": 9})
    assert runs.load(directory, chunks).extra == {"consumed": 9}
    assert runs.load(directory, chunks, step=1).extra == {"consumed": 7}
    names = ["latest", "step_00000001", "step_00000002"]
    assert sorted(path.name for path in directory.iterdir()) == names


def test_an_interrupted_save_is_never_loaded(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(interrupt_a_save, directory=tmp_path)


def build_scheduler(optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=0.01,
        min_lr=0.001,
        lr_warmup_steps=2,
        lr_decay_steps=10,
        lr_decay_style="cosine",
        start_wd=0.0,
        end_wd=0.1,
        wd_incr_steps=10,
        wd_incr_style="linear",
    )


def resume_a_schedule(directory: Path) -> None:
    setup.initialize()
    chunks, optimizer = build({}, {}, min_lr=0.001)
    scheduler = build_scheduler(optimizer)
    scheduler.step(increment=5)
    runs.save(directory, 5, chunks, optimizer, scheduler)
    expected = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    chunks, optimizer = build({}, {}, min_lr=0.001)
    scheduler = build_scheduler(optimizer)
    scheduler.step(increment=3)  # which must not count on top
    runs.load(directory, chunks, optimizer, scheduler)
    assert scheduler.num_steps == 5
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == expected


def test_a_schedule_continues_where_it_was(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(resume_a_schedule, directory=tmp_path)


def load_what_is_not_there(directory: Path) -> None:
    setup.initialize(pp=2)
    chunks, optimizer = build({}, {})
    with pytest.raises(FileNotFoundError, match="no complete checkpoint in"):
        runs.load(directory, chunks)
    runs.save(directory, 1, chunks)
    with pytest.raises(ValueError, match="saved without an optimizer"):
        runs.load(directory, chunks, optimizer)
    with pytest.raises(ValueError, match="saved without a scheduler"):
        runs.load(directory, chunks, scheduler=build_scheduler(optimizer))


def load_into_another_model(directory: Path) -> None:
    setup.initialize(pp=2)
    runs.save(directory, 1, build({}, {})[0])
    wider, _ = build({"ffn_hidden_size": 96}, {})
    difference = r"linear_fc1.weight has shape \(192, 32\), but \(160, 32\) in the checkpoint"
    with pytest.raises(ValueError, match=rf"(?s)8 tensors differ:.*{difference}"):
        runs.load(directory, wider)
    # Only the second stage differs, and still both raise.
    tied = setup.tiny_gpt(setup.tiny_config(**DENSE), tied=True)
    with pytest.raises(ValueError, match=r"output_layer\.weight is not in the model"):
        runs.load(directory, tied)


def save_where_no_one_can(directory: Path) -> None:
    setup.initialize(pp=2)
    (directory / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        runs.save(directory / "file", 1, build({}, {})[0])


@pytest.mark.parametrize(
    "function", [load_what_is_not_there, load_into_another_model, save_where_no_one_can]
)
def test_every_rank_raises_the_same_clear_error(
    pool: WorkerPool, tmp_path: Path, function: Callable[[Path], None]
) -> None:
    pool.run(function, 2, directory=tmp_path)


def checkpoint_sgd(directory: Path) -> None:
    setup.initialize()
    chunks, optimizer = build({}, {}, optimizer="sgd")
    with pytest.raises(ValueError, match="cannot save or load the state of SGD"):
        runs.save(directory, 1, chunks, optimizer)


def test_other_optimizers_than_adam_are_refused(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(checkpoint_sgd, directory=tmp_path)
