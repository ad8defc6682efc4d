"""Router updates without a line in the training loop equal those of a call after each step."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mor_layers import DepthAndWidth, ExpertChoice, RecursionConfig, TokenChoice
from mor_megatron import (
    recursion_block_spec,
    recursion_layers,
    routing_reports,
    update_routers,
    update_routers_automatically,
)
from mor_megatron.checkpoints import runs
from mor_megatron.models.megatron_lm import recursion_builder, recursion_spec
from tests.distributed import megatron_setup as setup
from tests.distributed.models.test_megatron_lm import gpt
from tests.distributed.pool import WorkerPool
from tests.pairs import sweep

SEQUENCE_LENGTH = 14
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_token_dispatcher_type": "alltoall",
}
WARMUP = RecursionConfig(3, router=ExpertChoice(warmup_steps=4, alpha=0.5))
LOSS_FREE = RecursionConfig(3, router=TokenChoice(balancing="loss_free"))
WIDTH = RecursionConfig(3, router=DepthAndWidth(mean_experts=1.5))


@dataclass(frozen=True)
class Trained:
    """What became of a model."""

    losses: list[float]
    weights: dict[str, Tensor]
    routers: dict[str, Tensor]
    """Buffers of the recursion's routers, over tokens and over experts."""
    shares: list[tuple[float, ...]]
    """Of the last report."""


@dataclass(frozen=True)
class Loop:
    """How a model is built and trained."""

    updates: str
    """'call': after each step; 'itself': by the schedule; 'both'."""
    build: str = "builder"
    evaluates: bool = False
    """Before each batch, which its counts must not notice."""
    resumes_from: str | None = None
    """A folder with a run's first steps."""
    saves_to: str | None = None
    """A folder for them."""


def train(
    layout: dict[str, Any],
    config: dict[str, Any],
    recursion: RecursionConfig,
    loop: Loop,
    steps: int = 3,
) -> Trained:
    setup.initialize(**layout)
    chunks = _chunks(setup.tiny_config(num_layers=8, **config), recursion, loop)
    optimizer = setup.build_optimizer(chunks, adam_eps=1e-3)
    first, losses, shares = 0, [], []
    if loop.resumes_from is not None:
        first = runs.load(loop.resumes_from, chunks, optimizer).step
    for step in range(first, steps):
        if loop.evaluates:
            for chunk in chunks:
                chunk.eval()
            with torch.no_grad():
                tokens = setup.random_tokens(4, SEQUENCE_LENGTH, seed=100 + step)
                setup.forward_backward(chunks, tokens, forward_only=True)
            for chunk in chunks:
                chunk.train()
        tokens = setup.random_tokens(4, SEQUENCE_LENGTH, seed=step)
        losses.append(setup.train_step(chunks, optimizer, tokens))
        if loop.updates != "itself":
            update_routers(chunks)
        if loop.updates != "itself" or step == steps - 1:
            shares = [report.shares for report in routing_reports(chunks)]
        if loop.saves_to is not None and step == 0:
            runs.save(loop.saves_to, 1, chunks, optimizer)
    return Trained(losses, setup.gather_parameters(chunks), _routers(chunks), shares)


def _chunks(config: Any, recursion: RecursionConfig, loop: Loop) -> list[Any]:
    if loop.updates == "call":
        spec: Any = recursion_block_spec(config, recursion)
    elif loop.build == "builder":
        spec = recursion_builder(recursion)(config)
    else:
        spec = recursion_spec(recursion)
    model = gpt(config, spec)
    setup.fill_parameters([model])
    return setup.data_parallel([model])


def _routers(chunks: list[Any]) -> dict[str, Tensor]:
    state = {}
    for layer in recursion_layers(chunks):
        state |= {f"depth.{n}": b.clone() for n, b in layer.recursion.router.named_buffers()}
        for index, router in enumerate(layer.expert_routers):
            if router.mean_experts is not None:
                state |= {f"width.{index}.{n}": b for n, b in router.widths.state_dict().items()}
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, state)
    return {name: value for part in gathered for name, value in part.items()}


def assert_same(one: Trained, other: Trained) -> None:
    assert one.losses == other.losses
    assert one.shares == other.shares
    torch.testing.assert_close(one.routers, other.routers, rtol=0, atol=0)
    torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=0)


CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], RecursionConfig, Loop]] = {
    "warm-up": (1, {}, {}, WARMUP, Loop("itself")),
    "warm-up, full recomputation": (1, {}, FULL, WARMUP, Loop("itself")),
    "loss-free, PP2": (2, {"pp": 2}, {}, LOSS_FREE, Loop("itself")),
    "warm-up, DP2": (2, {}, {}, WARMUP, Loop("itself")),
    "loss-free, DP2, full recomputation": (2, {}, FULL, LOSS_FREE, Loop("itself")),
    "widths": (1, {}, MOE, WIDTH, Loop("itself")),
    "loss-free, by spec": (1, {}, {}, LOSS_FREE, Loop("itself", build="spec")),
    "a call as well": (1, {}, {}, LOSS_FREE, Loop("both")),
    "evaluation between": (1, {}, {}, LOSS_FREE, Loop("itself", evaluates=True)),
    "widths, evaluation between": (1, {}, MOE, WIDTH, Loop("itself", evaluates=True)),
}
DAILY = [
    "warm-up, full recomputation",
    "loss-free, PP2",
    "loss-free, DP2, full recomputation",
    "widths",
    "a call as well",
    "evaluation between",
]


@pytest.mark.parametrize("case", sweep([(case,) for case in CASES], [(case,) for case in DAILY]))
def test_updates_by_themselves_equal_a_call_after_each_step(pool: WorkerPool, case: str) -> None:
    size, layout, config, recursion, loop = CASES[case]
    run = partial(pool.run, train, size, layout=layout, config=config, recursion=recursion)
    for called, itself in zip(run(loop=Loop("call")), run(loop=loop), strict=True):
        assert any(buffer.any() for buffer in called.routers.values())  # there was an update
        assert_same(itself, called)


def test_updates_by_themselves_go_on_after_a_resume(pool: WorkerPool, tmp_path: Path) -> None:
    folder = str(tmp_path)
    run = partial(pool.run, train, layout={}, config={}, recursion=WARMUP)
    (whole,) = run(loop=Loop("itself", saves_to=folder))
    (resumed,) = run(loop=Loop("itself", resumes_from=folder))
    assert_same(resumed, replace(whole, losses=whole.losses[1:]))


def other_functions() -> tuple[bool, list[str]]:
    """Whether a second installation changes nothing, and what the schedule calls in which order."""
    setup.initialize()
    config, calls = setup.tiny_config(num_layers=8), []
    config.finalize_model_grads_func = lambda *args, **kwargs: calls.append("earlier")
    update_routers_automatically(config)
    installed = config.finalize_model_grads_func
    update_routers_automatically(config)
    installed([], None, pg_collection=None)
    return config.finalize_model_grads_func is installed, calls


def test_a_function_that_was_there_is_called_and_none_is_installed_twice(pool: WorkerPool) -> None:
    assert pool.run(other_functions) == [(True, ["earlier"])]
