"""Depth × expert in Megatron: N ranks compute, count and update what one rank does."""

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mor_layers import (
    DepthAndWidth,
    ExpertChoice,
    RecursionConfig,
    Router,
    RouterConfig,
    TokenChoice,
)
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

SEQUENCE_LENGTH = 14
# No layers outside the recursion: Megatron's own drop by the tokens of one rank alone.
MOE = {
    "num_layers": 6,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "moe_token_dispatcher_type": "alltoall",
}
SP = {"sequence_parallel": True}
BIAS = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
EXPERT = ExpertChoice(predictor_coefficient=0.1, alpha=0.5)


@dataclass(frozen=True)
class AllOrNothing(RouterConfig):
    """A sequence goes on as a whole, or not at all, as the state of its first token says."""

    def build(self, hidden_size: int, num_recursions: int) -> "AllOrNothingRouter":
        return AllOrNothingRouter(num_recursions)


class AllOrNothingRouter(Router):
    def logits(self, hidden, step):
        return hidden[..., :1].detach().float()

    def decide(self, logits, step, previous, causal=False):
        if step == 0:
            goes_on = (logits[:1, :, 0] > 0).expand(len(logits), -1)
            return previous.with_plan(goes_on[..., None].float()).keep_all()
        is_selected = previous.plan[..., 0] > 0
        if previous.tokens.is_padding is not None:
            is_selected = is_selected & ~previous.tokens.is_padding
        return previous.keep_where(is_selected)


@dataclass(frozen=True)
class Outcome:
    """What one layout computed in two training iterations without an optimizer."""

    losses: list[float]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    """Biases and thresholds after them."""
    cells: dict[str, Tensor]
    shares: tuple[float, ...]


def iterate(
    layout: dict[str, Any],
    recursion: RecursionConfig,
    config: dict[str, Any],
    tokens: Tensor | None = None,
) -> Outcome:
    from torch.distributed import all_gather_object, get_world_size

    from mor_megatron import recursion_block_spec, routing_reports, update_routers

    setup.initialize(**layout)
    chunks = setup.tiny_gpt(
        setup.tiny_config(**config),
        block=lambda c, vp_stage: recursion_block_spec(c, recursion, vp_stage=vp_stage),
    )
    wrapped = setup.data_parallel(chunks)
    if tokens is None:
        tokens = setup.random_tokens(4, SEQUENCE_LENGTH)
    losses = []
    for _ in range(2):
        losses.append(setup.forward_backward(wrapped, tokens, 1))
        update_routers(wrapped)
    own = {}
    for chunk in chunks:
        for name, buffer in chunk.named_buffers():
            if "recursion." in name and name.endswith(("expert_bias", "s.values")):
                own[".".join(name.split(".")[3:])] = buffer.clone()
    found: list[Any] = [None] * get_world_size()
    all_gather_object(found, own)
    state: dict[str, Tensor] = {}
    for part in found:
        for name, buffer in part.items():
            assert torch.equal(state.setdefault(name, buffer), buffer), f"{name} differs by rank"
    (report,) = routing_reports(wrapped)
    cells = {n: getattr(report, f"expert_{n}") for n in ("load", "drops", "balance", "z_loss")}
    return Outcome(losses, setup.gather_gradients(wrapped), state, cells, report.shares)


@pytest.fixture(scope="module")
def one_rank(pool: WorkerPool):
    known: dict[str, Outcome] = {}

    def compute(recursion: RecursionConfig, config: dict[str, Any], tokens=None) -> Outcome:
        key = repr((recursion, sorted(config.items()), None if tokens is None else tokens.tolist()))
        if key not in known:
            (known[key],) = pool.run(
                iterate, 1, layout={}, recursion=recursion, config=config, tokens=tokens
            )
        return known[key]

    return compute


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.losses == pytest.approx(expected.losses, abs=1e-6)
    assert outcome.shares == pytest.approx(expected.shares)
    for part in ("gradients", "state", "cells"):
        got, wanted = getattr(outcome, part), getattr(expected, part)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                got[name], value, rtol=1e-5, atol=1e-6, msg=partial(_named, f"{part} {name}")
            )


def _named(name: str, message: str) -> str:
    return f"{name}: {message}"


def of(router: RouterConfig, **options: Any) -> RecursionConfig:
    return RecursionConfig(3, "cycle", router, **options)


RECURSIONS: dict[str, tuple[RecursionConfig, dict[str, Any]]] = {
    "shared": (of(EXPERT), MOE),
    "a router a step": (of(EXPERT, expert_routers="per_step"), MOE),
    "ragged": (of(TokenChoice(), expert_routers="per_step", kv_policy="exit_state"), MOE),
    "bias": (of(TokenChoice()), MOE | BIAS),
    "bias, a router a step": (of(EXPERT, expert_routers="per_step"), MOE | BIAS),
    "drops": (of(EXPERT), MOE | {"moe_expert_capacity_factor": 0.6}),
    "drops, ragged": (of(TokenChoice()), MOE | {"moe_expert_capacity_factor": 0.6}),
    "drops by position": (
        of(EXPERT), MOE | {"moe_expert_capacity_factor": 0.6, "moe_token_drop_policy": "position"}
    ),
    "depth and width": (
        of(DepthAndWidth(mean_experts=1.5), kv_policy="exit_state", expert_routers="per_step"),
        MOE | {"moe_router_topk": 3},
    ),
    "depth and width, drops": (
        of(DepthAndWidth(mean_experts=1.5)),
        MOE | {"moe_router_topk": 3, "moe_expert_capacity_factor": 0.6},
    ),
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "ep": (2, {"ep": 2}, {}),
    "ep allgather": (2, {"ep": 2}, {"moe_token_dispatcher_type": "allgather"}),
    "tp+sp": (2, {"tp": 2}, SP),
    "tp+sp ep etp1": (2, {"tp": 2, "ep": 2, "etp": 1}, SP),
    "ep x tp": (4, {"tp": 2, "ep": 2}, SP),
    "ep recompute": (
        2,
        {"ep": 2},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    ),
}
SAMPLE = {
    ("a router a step", "tp+sp ep etp1"),
    ("ragged", "ep"),
    ("bias, a router a step", "ep recompute"),
    ("drops, ragged", "tp+sp ep etp1"),
    ("depth and width", "tp+sp ep etp1"),
    ("depth and width", "ep"),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(n, w, marks=[] if (n, w) in SAMPLE else [pytest.mark.full])
        for n in RECURSIONS
        for w in LAYOUTS
    ],
)
def test_a_layout_computes_what_one_rank_computes(
    pool: WorkerPool, one_rank, name: str, layout: str
) -> None:
    recursion, config = RECURSIONS[name]
    world_size, parallel, extra = LAYOUTS[layout]
    expected = one_rank(recursion, config)
    for outcome in pool.run(
        iterate, world_size, layout=parallel, recursion=recursion, config=config | extra
    ):
        assert_same(outcome, expected)


@pytest.mark.full
@pytest.mark.parametrize("name", ["ragged", "bias, a router a step", "depth and width"])
def test_expert_and_pipeline_ranks_together_compute_what_one_rank_computes(
    pool: WorkerPool, one_rank, name: str
) -> None:
    recursion, config = RECURSIONS[name]
    # Two stages need something beside the recursion: a layer before it and one after.
    recursion = RecursionConfig(
        3, "middle_cycle", recursion.router, recursion.kv_policy,
        expert_routers=recursion.expert_routers,
    )  # fmt: skip
    config = config | {"num_layers": 8}
    expected = one_rank(recursion, config)
    for outcome in pool.run(
        iterate, 4, layout={"ep": 2, "pp": 2}, recursion=recursion, config=config
    ):
        assert_same(outcome, expected)


def first_tokens() -> tuple[int, int]:
    """A token id that goes on and one that does not, from the weights that tests set."""
    generator = torch.Generator().manual_seed(zlib.crc32(b"embedding.word_embeddings.weight"))
    column = torch.randn(setup.VOCAB_SIZE, 32, generator=generator)[:, 0]
    return int(column.argmax()), int(column.argmin())


@pytest.mark.parametrize(
    "layout",
    [
        "ep",
        *(
            pytest.param(layout, marks=pytest.mark.full)
            for layout in ("ep allgather", "tp+sp ep etp1", "ep x tp")
        ),
    ],
)
def test_all_tokens_on_one_rank_and_none_on_the_other_are_exact(
    pool: WorkerPool, one_rank, layout: str
) -> None:
    going, staying = first_tokens()
    tokens = setup.random_tokens(4, SEQUENCE_LENGTH)
    tokens[:2, 0], tokens[2:, 0] = going, staying  # the first rank has two, the second the others
    recursion = of(AllOrNothing(), expert_routers="per_step", kv_policy="exit_state")
    world_size, parallel, extra = LAYOUTS[layout]
    expected = one_rank(recursion, MOE, tokens)
    assert expected.shares == (1.0, 0.5, 0.5)
    # Padding goes to no expert.
    loads = expected.cells["load"].sum(dim=-1)
    assert loads[:, 0].tolist() == [2 * 2 * 4 * 14, 2 * 2 * 2 * 14, 2 * 2 * 2 * 14]
    for outcome in pool.run(
        iterate, world_size, layout=parallel, recursion=recursion, config=MOE | extra, tokens=tokens
    ):
        assert_same(outcome, expected)


def test_every_cell_is_counted_and_its_bias_moves_on_its_own(one_rank) -> None:
    recursion, config = RECURSIONS["bias"]
    outcome = one_rank(recursion, config)
    load = outcome.cells["load"]
    ran = torch.tensor(outcome.shares) * 2 * 4 * SEQUENCE_LENGTH
    torch.testing.assert_close(load.sum(dim=-1), (2 * ran)[:, None].expand(3, 2))
    assert outcome.cells["balance"].sum(dim=-1).min() > 0.5
    biases = [b for n, b in sorted(outcome.state.items()) if n.endswith("expert_bias")]
    assert len(biases) == 3 * 2
    assert all(bias.any() for bias in biases)
    assert len({tuple(bias.tolist()) for bias in biases}) > 1


def test_a_mean_number_of_experts_is_held_and_drops_are_counted(one_rank) -> None:
    recursion, config = RECURSIONS["depth and width, drops"]
    outcome = one_rank(recursion, config)
    assert outcome.cells["drops"].sum() > 0
    thresholds = [n for n in outcome.state if n.endswith("widths.values")]
    assert len(thresholds) == 2
    assert all(outcome.state[n].any() for n in thresholds)
    assert outcome.state["recursion.router.depths.values"].any()


def dial(recursion: RecursionConfig, config: dict[str, Any]) -> list[tuple[float, float]]:
    """Mean depth and experts per token, as it is and with the dial turned down and up."""
    from mor_layers.generation import turn_dial
    from mor_megatron import recursion_block_spec, routing_reports

    setup.initialize()
    chunks = setup.tiny_gpt(
        setup.tiny_config(**config),
        block=lambda c, vp_stage: recursion_block_spec(c, recursion, vp_stage=vp_stage),
    )
    chunks[0].eval()
    ids = setup.random_tokens(4, SEQUENCE_LENGTH)[:, :-1]
    positions, spent = torch.arange(SEQUENCE_LENGTH).expand(4, -1), []
    for depth, width in ((0.0, 0.0), (0.5, 0.3), (-9.0, -1.0)):
        turn_dial(chunks[0], depth, width)
        with torch.no_grad():
            chunks[0](ids, positions, None)
        (report,) = routing_reports(chunks)
        tokens = sum(report.shares) * ids.numel()
        spent.append((sum(report.shares), float(report.expert_load.sum()) / (2 * tokens)))
    return spent


def test_the_dial_turns_depth_and_width(pool: WorkerPool) -> None:
    recursion, config = RECURSIONS["depth and width"]
    usual, less, more = pool.run(dial, 1, recursion=recursion, config=config)[0]
    assert less[0] < usual[0] < more[0]
    assert less[1] < usual[1] == pytest.approx(3.0)  # untrained thresholds bar no expert
    assert more == pytest.approx((3.0, 3.0))


def refusals(cases: list[tuple[RecursionConfig, dict[str, Any]]]) -> list[str]:
    from mor_megatron import recursion_block_spec

    setup.initialize()
    messages = []
    for recursion, config in cases:
        try:
            setup.tiny_gpt(
                setup.tiny_config(**config),
                block=partial(_block, recursion_block_spec, recursion),
            )
            messages.append("accepted")
        except ValueError as error:
            messages.append(str(error))
    return messages


def _block(build: Any, recursion: RecursionConfig, config: Any, vp_stage: Any) -> Any:
    return build(config, recursion, vp_stage=vp_stage)


def test_what_cannot_take_effect_is_refused(pool: WorkerPool) -> None:
    width, dense = DepthAndWidth(mean_experts=1.5), {"num_layers": 6}
    cases = {
        "expert_routers='per_step'": (of(EXPERT, expert_routers="per_step"), dense),
        "mean_experts=1.5": (of(width), dense),
        "moe_router_topk=1": (of(width), MOE | {"moe_router_topk": 1,
                                                "moe_router_pre_softmax": True}),
        "softmax probabilities": (of(width), MOE | BIAS),
        "moe_pad_expert_input_to_capacity": (
            of(EXPERT),
            MOE | {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        ),
    }  # fmt: skip
    messages = pool.run(refusals, 1, cases=list(cases.values()))[0]
    for named, message in zip(cases, messages, strict=True):
        assert named in message
