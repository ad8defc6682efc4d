"""A recursion under FSDP2: what travels, and that nothing else changes."""

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

import fsdp2
from mor_layers import MoRTransformer
from tests.distributed.pool import WorkerPool

RANKS, STEPS, LAYERS = 2, 3, 2


def collectives(unit: fsdp2.Unit, keep_gathered: bool) -> tuple[Counter[str], Counter[str]]:
    return fsdp2.count_collectives(init_device_mesh("cpu", (RANKS,)), unit, keep_gathered)


# All-gathers forward and backward. Gradients add up over the steps before they are reduced.
@pytest.mark.parametrize(
    ("unit", "keep_gathered", "forward", "backward", "reduced"),
    [
        ("block", False, 1, 1, 1),
        ("block", True, 1, 0, 1),
        ("stack", False, STEPS, STEPS, 1),
        ("layer", False, STEPS * LAYERS, STEPS * LAYERS, LAYERS),
        ("layer", True, LAYERS, (STEPS - 1) * LAYERS, LAYERS),
    ],
)
def test_weights_are_gathered_once_for_all_steps_only_where_the_block_is_sharded(
    pool: WorkerPool,
    unit: fsdp2.Unit,
    keep_gathered: bool,
    forward: int,
    backward: int,
    reduced: int,
) -> None:
    for first, second in pool.run(collectives, RANKS, unit=unit, keep_gathered=keep_gathered):
        assert first == {"all-gathers": forward}
        assert second["all-gathers"] == backward
        assert second["reduce-scatters"] == reduced


def trained(unit: fsdp2.Unit | None, recompute: bool, rows: slice) -> dict[str, Any]:
    """Losses and gradients of one batch, and what two steps of training make of the weights."""
    torch.manual_seed(0)
    model = MoRTransformer(fsdp2.CONFIG, recompute=recompute)
    if unit is not None:
        fsdp2.shard(model, init_device_mesh("cpu", (RANKS,)), unit)
        rank = torch.distributed.get_rank()
        rows = slice(2 * rank, 2 * rank + 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, gradients = [], {}
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(256, (2 * RANKS, 17), generator=generator)[rows]
        output = model(ids, labels=fsdp2.next_ids(ids))
        output.loss.backward()
        losses.append(output.loss.item())
        if not gradients:
            gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"losses": losses, "gradients": gradients, "weights": weights}


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


@pytest.mark.parametrize(
    ("unit", "recompute"), [("block", False), ("block", True), ("layer", False)]
)
def test_losses_gradients_and_trained_weights_equal_those_of_one_rank(
    pool: WorkerPool, unit: fsdp2.Unit, recompute: bool
) -> None:
    sharded = pool.run(trained, RANKS, unit=unit, recompute=recompute, rows=slice(None))
    alone = trained(None, recompute, slice(None))
    for step, loss in enumerate(alone["losses"]):
        mean = sum(rank["losses"][step] for rank in sharded) / RANKS
        assert mean == pytest.approx(loss, abs=1e-5)
    for rank in sharded:
        torch.testing.assert_close(rank["gradients"], alone["gradients"], rtol=1e-4, atol=1e-6)
    # Other ranks get an empty one.
    weights = sharded[0]["weights"]
    assert weights.keys() == alone["weights"].keys()
    torch.testing.assert_close(weights, alone["weights"], rtol=1e-4, atol=1e-5)
    MoRTransformer(fsdp2.CONFIG).load_state_dict(weights)


def first_and_last_loss(steps: int) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = [
            output.lm_loss.item()
            for output in fsdp2.train(init_device_mesh("cpu", (RANKS,)), steps)
        ]
    return losses[0], losses[-1]


def test_the_example_learns(pool: WorkerPool) -> None:
    for first, last in pool.run(first_and_last_loss, RANKS, steps=8):
        assert last < first - 1.0
