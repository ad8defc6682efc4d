"""Sequences over context-parallel ranks: N ranks compute what one rank computes."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor, nn

from mor_layers import (
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    RandomDepth,
    RandomLoops,
    RecursionConfig,
    TokenChoice,
)
from mor_layers.layers import NormModulation
from mor_layers.recursion import HistoryInjection, HyperConnections, KVPolicy, LoopLoss
from mor_layers.routers import AdaptiveHalting
from mor_megatron import causal_routing, recursion_block_spec, routing_reports
from mor_megatron.step import Relayout, in_sequence_order, zigzag_positions
from mor_megatron.training import weigh_loops
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

LENGTH = 24  # with three steps: 24, 16 and 8 tokens; by capacities of one's own 24, 13 and 7
ROUTERS = {
    "expert": ExpertChoice(predictor_coefficient=0.1, z_loss_coefficient=0.01, alpha=0.5),
    "expert, odd": ExpertChoice(
        capacity_factors=(1.0, 0.58, 0.3), predictor="aux_router", alpha=0.5
    ),
    "token": TokenChoice(z_loss_coefficient=0.01),
    "random": RandomDepth(),
    "fixed": FixedDepth(),
    "depth and width": DepthAndWidth(),
}
POLICIES: tuple[KVPolicy, ...] = (
    "recursion_wise",
    "recursive_sharing",
    "sharing_with_update",
    "exit_state",
)
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "moe_token_dispatcher_type": "alltoall",
}
FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
# name: ranks, layout, config
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "cp": (2, {"cp": 2}, {}),
    "cp, recomputed": (2, {"cp": 2}, FULL_RECOMPUTE),
    "cp x dp": (4, {"cp": 2}, {}),
    "cp x pp": (4, {"cp": 2, "pp": 2}, {}),
    "cp x tp": (4, {"cp": 2, "tp": 2}, {}),
    "cp x tp+sp": (4, {"cp": 2, "tp": 2}, {"sequence_parallel": True}),
    "cp=4": (4, {"cp": 4}, {}),
    "cp, experts": (2, {"cp": 2}, MOE),
    "cp x ep": (2, {"cp": 2, "ep": 2}, MOE),
    "cp x tp+sp, experts": (4, {"cp": 2, "tp": 2}, MOE | {"sequence_parallel": True}),
}
SAMPLE = {
    ("expert", "recursion_wise", "cp"),
    ("token", "recursive_sharing", "cp"),
    ("expert, odd", "sharing_with_update", "cp x tp+sp"),
    ("depth and width", "exit_state", "cp"),
    ("expert", "recursion_wise", "cp x ep"),
}


@dataclass(frozen=True)
class Outcome:
    """What one layout computes."""

    loss: float
    gradients: dict[str, Tensor]
    shares: tuple[float, ...]
    expert_load: Tensor | None


def loss_and_gradients(
    layout: dict[str, Any],
    recursion: RecursionConfig,
    config: dict[str, Any],
    masks: str | None = None,
) -> Outcome:
    setup.initialize(**layout)
    chunks = setup.tiny_gpt(
        setup.tiny_config(num_layers=8, **config),
        block=lambda c, vp_stage: recursion_block_spec(c, recursion, vp_stage=vp_stage),
    )
    weigh_loops(chunks)
    wrapped = setup.data_parallel(chunks)
    loss = forward_backward(wrapped, setup.random_tokens(4, LENGTH), masks)
    gradients = setup.gather_gradients(wrapped)
    report, *_ = routing_reports(wrapped)
    return Outcome(loss, gradients, report.shares, report.expert_load)


def forward_backward(chunks: list[Any], tokens: Tensor, masks: str | None) -> float:
    """The mean loss of the global batch, each context-parallel rank with its part of sequences."""
    world = parallel_state.get_data_parallel_world_size()
    share = tokens.chunk(world)[parallel_state.get_data_parallel_rank()]
    group = parallel_state.get_context_parallel_group()
    for chunk in chunks:
        chunk.zero_grad_buffer()

    def forward_step(microbatches: Any, model: nn.Module) -> Any:
        sequence = next(microbatches)  # [b, s + 1]
        count = len(sequence)
        batch: dict[str, Any] = {
            "tokens": sequence[:, :-1],
            "labels": sequence[:, 1:],
            "positions": torch.arange(LENGTH).expand(count, -1),
        }
        if masks is not None:
            documents = torch.arange(LENGTH) // 9
            same = documents[:, None] == documents[None]
            whole = same.tril().logical_not().expand(count, 1, -1, -1)
            batch["padding"] = (torch.arange(LENGTH) >= LENGTH - 5).expand(count, -1)
            if masks == "cut":
                batch["attention_mask"] = whole
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
        if masks == "whole":
            batch["attention_mask"] = whole
        losses = model(
            batch["tokens"],
            batch["positions"],
            batch.get("attention_mask"),
            labels=batch["labels"],
            padding_mask=batch.get("padding"),
        )

        def mean(losses: Tensor) -> tuple[Tensor, Tensor]:
            kept = torch.ones_like(losses)
            if "padding" in batch:
                kept = 1 - batch["padding"].float()
            number = count * (LENGTH - (5 if masks is not None else 0))
            part = (losses * kept).sum() / number  # of this rank; together they are the mean
            return part, part.detach().clone()

        return losses, mean

    microbatches = share.split(1)
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=chunks,
        num_microbatches=len(microbatches),
        seq_length=LENGTH,
        micro_batch_size=1,
        forward_only=False,
    )
    total = torch.tensor(sum(reports), dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return (total / parallel_state.get_tensor_model_parallel_world_size() / len(tokens)).item()


@pytest.fixture(scope="module")
def one_rank(pool: WorkerPool):
    known: dict[Any, Outcome] = {}

    def compute(recursion: RecursionConfig, config: dict[str, Any], masks: str | None) -> Outcome:
        key = (recursion, "num_moe_experts" in config, masks)
        if key not in known:
            plain = {k: v for k, v in config.items() if k not in {"sequence_parallel"}}
            known[key] = pool.run(
                loss_and_gradients, 1, layout={}, recursion=recursion, config=plain, masks=masks
            )[0]
        return known[key]

    return compute


def assert_alike(outcomes: list[Outcome], expected: Outcome) -> None:
    for outcome in outcomes:
        assert outcome.loss == pytest.approx(expected.loss, abs=1e-6)
        assert outcome.shares == pytest.approx(expected.shares)
        if expected.expert_load is not None:
            assert torch.equal(outcome.expert_load, expected.expert_load)
        assert outcome.gradients.keys() == expected.gradients.keys()
        for name, gradient in outcome.gradients.items():
            torch.testing.assert_close(
                gradient, expected.gradients[name], rtol=1e-5, atol=1e-6, msg=partial(_named, name)
            )


def _named(name: str, message: str) -> str:
    return f"{name}: {message}"


@pytest.mark.parametrize(
    ("router", "policy", "layout"),
    [
        pytest.param(
            router,
            policy,
            layout,
            marks=() if (router, policy, layout) in SAMPLE else pytest.mark.full,
        )
        for router in ROUTERS
        for policy in POLICIES
        for layout in LAYOUTS
        # Replicas draw random depths side by side, one rank draws them one after the other.
        if (router, layout) != ("random", "cp x dp")
    ],
)
def test_a_layout_computes_what_one_rank_computes(
    pool: WorkerPool, one_rank, router: str, policy: KVPolicy, layout: str
) -> None:
    world_size, parallel, config = LAYOUTS[layout]
    recursion = RecursionConfig(3, router=ROUTERS[router], kv_policy=policy)
    outcomes = pool.run(
        loss_and_gradients, world_size, layout=parallel, recursion=recursion, config=config
    )
    assert_alike(outcomes, one_rank(recursion, config, None))


@pytest.mark.parametrize(
    ("masks", "layout"),
    [("cut", "cp x tp+sp"), pytest.param(None, "cp", marks=pytest.mark.full)],
)
def test_a_loss_after_every_loop_counts_each_rank_once(
    pool: WorkerPool, one_rank, masks: str | None, layout: str
) -> None:
    world_size, parallel, config = LAYOUTS[layout]
    recursion = RecursionConfig(
        3, router=ROUTERS["token"], loop_loss=LoopLoss("poisson", 2.0, scale_penalty=0.2)
    )
    outcomes = pool.run(
        loss_and_gradients,
        world_size,
        layout=parallel,
        recursion=recursion,
        config=config,
        masks=masks,
    )
    assert_alike(outcomes, one_rank(recursion, config, masks))


@pytest.mark.full
@pytest.mark.parametrize(
    "recursion",
    [
        RecursionConfig(3, router=ROUTERS["token"], own_per_step=("attention",)),
        RecursionConfig(
            3,
            router=ROUTERS["token"],
            kv_policy="exit_state",
            hyper_connections=HyperConnections(2),
        ),
        RecursionConfig(
            3,
            router=ROUTERS["expert"],
            norm_modulation=NormModulation(3),
            history=HistoryInjection(1),
        ),
        RecursionConfig(3, router=AdaptiveHalting(bias=0.0)),
        RecursionConfig(
            3, router=RandomLoops(draw="largest", backward_steps=2), input_injection=True
        ),
        RecursionConfig(
            1,
            "middle_sequence",
            ExpertChoice(capacity_factors=(0.5,)),
            anchor_every=3,
            depth_balance=0.5,
        ),
    ],
)
def test_what_makes_loops_pay_is_alike_on_every_rank(
    pool: WorkerPool, one_rank, recursion: RecursionConfig
) -> None:
    world_size, parallel, config = LAYOUTS["cp x tp+sp"]
    outcomes = pool.run(
        loss_and_gradients, world_size, layout=parallel, recursion=recursion, config=config
    )
    assert_alike(outcomes, one_rank(recursion, config, None))


@pytest.mark.parametrize("masks", ["cut", pytest.param("whole", marks=pytest.mark.full)])
@pytest.mark.parametrize("layout", [pytest.param("cp", marks=pytest.mark.full), "cp x tp+sp"])
def test_documents_and_padding_are_kept_apart(
    pool: WorkerPool, one_rank, layout: str, masks: str
) -> None:
    world_size, parallel, config = LAYOUTS[layout]
    recursion = RecursionConfig(3, router=ROUTERS["expert"])
    outcomes = pool.run(
        loss_and_gradients,
        world_size,
        layout=parallel,
        recursion=recursion,
        config=config,
        masks=masks,
    )
    assert_alike(outcomes, one_rank(recursion, {}, masks))


def layouts_of_rows() -> None:
    setup.initialize(cp=2)
    group = parallel_state.get_context_parallel_group()
    whole = torch.arange(24.0)[:, None].expand(24, 3).contiguous()
    mine = whole[zigzag_positions(24, 2)[group.rank()]].requires_grad_()
    assert mine[:, 0].tolist() == [[*range(6), *range(18, 24)], [*range(6, 18)]][group.rank()]
    assert torch.equal(in_sequence_order(mine, group), whole)
    relayout = Relayout(zigzag_positions(24, 2), group, torch.device("cpu"))
    rows = relayout.to_sequence(mine)
    assert torch.equal(rows, whole.chunk(2)[group.rank()])
    back = relayout.to_zigzag(rows)
    assert torch.equal(back, mine)
    (back * mine.detach()).sum().backward()
    assert torch.equal(mine.grad, mine.detach())


def test_rows_go_from_zigzag_to_sequence_order_and_back(pool: WorkerPool) -> None:
    pool.run(layouts_of_rows, 2)


def causal_depths(layout: dict[str, Any]) -> list[int]:
    setup.initialize(**layout)
    recursion = RecursionConfig(3, router=replace(ROUTERS["expert"], threshold=0.5))
    (model,) = setup.tiny_gpt(
        setup.tiny_config(num_layers=8), block=lambda c, _: recursion_block_spec(c, recursion)
    )
    ids = setup.random_tokens(1, LENGTH)[:, :-1]
    batch = {"tokens": ids, "positions": torch.arange(LENGTH)[None]}
    group = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    with torch.no_grad(), causal_routing(model.eval()):
        model(batch["tokens"], batch["positions"], None)
    return model.decoder.layers[1].statistics.depths[0].tolist()


def test_causal_routing_knows_the_whole_sequence(pool: WorkerPool) -> None:
    (expected,) = pool.run(causal_depths, 1, layout={})
    assert pool.run(causal_depths, 2, layout={"cp": 2}) == [expected, expected]


def test_a_length_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="26 tokens cannot be split into 4 equal chunks"):
        zigzag_positions(26, 2)
