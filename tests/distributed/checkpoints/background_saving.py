"""A program of two ranks that saves while it trains, and resumes. The pool's workers cannot fork."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from mor_layers import ExpertChoice, RecursionConfig
from mor_megatron import recursion_block_spec
from mor_megatron.checkpoints import runs
from mor_megatron.checkpoints.background import BackgroundSaves
from tests.distributed import megatron_setup as setup

RECURSION = RecursionConfig(3, router=ExpertChoice(warmup_steps=3))


def built():
    """The chunks of this rank, and their optimizer."""
    config = setup.tiny_config(num_layers=8, sequence_parallel=True)
    chunks = setup.tiny_gpt(config, lambda c, v: recursion_block_spec(c, RECURSION, vp_stage=v))
    wrapped = setup.data_parallel(chunks, use_distributed_optimizer=True)
    return wrapped, setup.build_optimizer(wrapped, adam_eps=1e-2)


def rank(number: int, folder: Path) -> None:
    """What each of two tensor-parallel ranks does."""
    address = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", address, rank=number, world_size=2)
    setup.initialize(tp=2)
    chunks, optimizer = built()
    batches = [setup.random_tokens(4, 16, seed) for seed in range(4)]
    for batch in batches[:2]:
        setup.train_step(chunks, optimizer, batch)
    place, saves = folder / "run", BackgroundSaves()
    assert saves.finish() is None
    target = saves.begin(place, 2, chunks, optimizer, extra={"seen": 8})
    assert runs.latest_step(place) is None
    losses = [setup.train_step(chunks, optimizer, batch) for batch in batches[2:]]
    assert saves.finish(waits=True) == target
    assert runs.latest_step(place) == 2
    parameters = setup.gather_parameters(chunks)

    chunks, optimizer = built()
    restored = runs.load(place, chunks, optimizer)
    assert (restored.step, restored.extra, restored.unsealed) == (2, {"seen": 8}, None)
    assert [setup.train_step(chunks, optimizer, batch) for batch in batches[2:]] == losses
    torch.testing.assert_close(setup.gather_parameters(chunks), parameters, rtol=0, atol=0)

    saves.begin(place, 4, chunks, optimizer)
    if number == 0:  # while it is being written, what is written goes
        for path in (place / ".step_00000004.partial").iterdir():
            path.unlink()
        os.rmdir(place / ".step_00000004.partial")
    torch.distributed.barrier()
    with pytest.raises(OSError, match=r"step_00000004 could not be written.*step_00000002"):
        saves.finish(waits=True)
    assert runs.latest_step(place) == 2
    assert saves.finish(waits=True) is None


if __name__ == "__main__":
    multiprocessing.start_processes(  # type: ignore[no-untyped-call]
        rank, (Path(sys.argv[1]),), nprocs=2, daemon=False, start_method="spawn"
    )
