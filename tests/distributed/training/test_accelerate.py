"""The transformers model under accelerate with FSDP2: two ranks train as one process does."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import mor_huggingface
from mor_layers import DecoderConfig, ExpertChoice, RecursionConfig
from tests.distributed.pool import WorkerPool

STEPS, BATCH, LENGTH = 3, 4, 12


@dataclass(frozen=True)
class Trained:
    """What a rank saw, and the whole model afterwards."""

    losses: list[float]
    """Mean over ranks, by step."""
    units: list[str]
    """Modules whose weights are gathered together."""
    sharded: list[str]
    """Parameters of which this rank holds a part."""
    weights: dict[str, Tensor]


def model() -> mor_huggingface.MoRForCausalLM:
    torch.manual_seed(0)
    recursion = RecursionConfig(3, router=ExpertChoice())
    config = DecoderConfig(50, 32, 64, num_unrolled_layers=5, num_heads=4, recursion=recursion)
    return mor_huggingface.MoRForCausalLM(mor_huggingface.MoRConfig.from_decoder(config))


def batches() -> Tensor:
    return torch.randint(50, (STEPS, BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


@contextmanager
def accelerator() -> Iterator[Any]:
    """An Accelerator with FSDP2 on this rank's CPU.

    accelerate only offers FSDP on GPUs and their like, so it is switched on by hand. What it then does
    with the model is the same.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    rank, size = str(torch.distributed.get_rank()), str(torch.distributed.get_world_size())
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with mock.patch.dict(os.environ, variables):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
        )
        made = Accelerator(cpu=True)
        made.state.distributed_type, made.state.fsdp_plugin = DistributedType.FSDP, plugin
        try:
            yield made
        finally:
            AcceleratorState._reset_state(True)


def train_sharded() -> Trained:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with accelerator() as chosen:
        sharded = model().train()
        optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
        sharded, optimizer = chosen.prepare(sharded, optimizer)
        losses = []
        for ids in batches():
            own = ids.chunk(size)[rank]
            loss = sharded(own, labels=own).loss
            chosen.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(chosen.reduce(loss.detach(), "mean").item())
        units = [name for name, m in sharded.named_modules() if isinstance(m, FSDPModule)]
        names = [name for name, p in sharded.named_parameters() if isinstance(p, DTensor)]
        whole = StateDictOptions(full_state_dict=True)
        return Trained(losses, units, names, get_model_state_dict(sharded, options=whole))


def test_two_ranks_train_as_one_process_does(pool: WorkerPool) -> None:
    found, _ = pool.run(train_sharded, 2)
    alone = model().train()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    losses = []
    for ids in batches():
        loss = alone(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert "model.recursions.0" in found.units
    assert not any(unit.startswith("model.recursions.0.") for unit in found.units)
    assert found.sharded == [name for name, _ in alone.named_parameters()]
    torch.testing.assert_close(found.losses, losses, rtol=0, atol=1e-5)
    assert found.weights.keys() == alone.state_dict().keys()
    for name, weight in alone.state_dict().items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-5)
