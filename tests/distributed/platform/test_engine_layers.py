"""Layers of Transformer Engine in a recursion, on a stand-in with its signatures and checks.

The stand-in (`te_stand_in`) takes the place of Transformer Engine in a process of its own, before
Megatron is imported there, so that Megatron's own wrappers around it run as they do on a GPU.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mor_layers import ExpertChoice, RecursionConfig, TokenChoice
from tests.distributed.platform import engine_models
from tests.distributed.pool import WorkerPool

STAND_IN = str(Path(__file__).with_name("te_stand_in"))
ROUTERS = {"expert": ExpertChoice(alpha=0.5), "token": TokenChoice()}
POLICIES = ["recursion_wise", "recursive_sharing", "sharing_with_update", "exit_state"]


def matrix(*quick: tuple[str, str]) -> Any:
    """Every router with every policy; but for the quick ones with `make test-full`."""
    return pytest.mark.parametrize(
        ("router", "policy"),
        [
            pytest.param(
                ROUTERS[router],
                policy,
                id=f"{router}-{policy}",
                marks=() if (router, policy) in quick else pytest.mark.full,
            )
            for router in ROUTERS
            for policy in POLICIES
        ],
    )


def both(pool: WorkerPool, recursion: RecursionConfig, **settings: Any) -> Any:
    """The outcome on local layers and on Transformer Engine's."""
    return [
        pool.run(engine_models.run, recursion=recursion, engine=engine, **settings)[0]
        for engine in (False, True)
    ]


def assert_same(local: Any, engine: Any) -> None:
    assert engine.loss == pytest.approx(local.loss, abs=1e-5)
    torch.testing.assert_close(engine.gradients, local.gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experts", [4, pytest.param(None, marks=pytest.mark.full)])
@matrix(
    ("expert", "recursion_wise"), ("token", "recursive_sharing"), ("expert", "sharing_with_update"),
    ("token", "exit_state"),
)  # fmt: skip
def test_layers_of_the_engine_give_the_local_numbers(
    stand_in_pool: WorkerPool, router: Any, policy: Any, experts: int | None
) -> None:
    recursion = RecursionConfig(3, router=router, kv_policy=policy)
    local, engine = both(stand_in_pool, recursion, experts=experts)
    assert not local.attention
    assert engine.attention
    assert_same(local, engine)


@matrix(("expert", "exit_state"), ("token", "recursion_wise"), ("token", "recursive_sharing"))
def test_attention_gets_what_it_has_fused_kernels_for(
    stand_in_pool: WorkerPool, router: Any, policy: Any
) -> None:
    """Plain causal attention, of ragged selections too. SDPA attends where a mask is needed."""
    recursion = RecursionConfig(3, router=router, kv_policy=policy)
    (outcome,) = stand_in_pool.run(engine_models.run, recursion=recursion, engine=True)
    calls = outcome.attention
    # The prelude's, those of two layers at each step that needs no mask, the coda's.
    steps = 3 if policy == "recursion_wise" else 1
    assert len(calls) == 1 + 2 * steps + 1
    for call in calls:
        assert (call.qkv_format, call.attn_mask_type) == ("sbhd", "causal")
        assert (call.backend, call.mask) == ("fused", None)
    if isinstance(router, ExpertChoice):  # of 14 tokens all, two thirds, one third
        assert [call.query[0] for call in calls[1:-1:2]] == [14, 9, 4][:steps]


def test_windows_are_not_left_to_the_engine_which_counts_rows(stand_in_pool: WorkerPool) -> None:
    recursion = RecursionConfig(3, router=ExpertChoice(), kv_policy="recursive_sharing")
    (outcome,) = stand_in_pool.run(
        engine_models.run, recursion=recursion, engine=True, window_size=(64, 0)
    )
    assert len(outcome.attention) == 2  # the prelude's and the coda's, whose rows are positions


@matrix(("expert", "recursion_wise"), ("token", "exit_state"))
def test_the_fused_rotary_embedding_turns_selected_tokens_by_an_indexed_table(
    stand_in_pool: WorkerPool, router: Any, policy: Any
) -> None:
    recursion = RecursionConfig(3, router=router, kv_policy=policy)
    plain, fused = (
        stand_in_pool.run(
            engine_models.run, recursion=recursion, engine=True, apply_rope_fusion=flag
        )[0]
        for flag in (False, True)
    )
    assert not plain.rotations
    assert_same(plain, fused)
    inner = fused.rotations[
        2:-2
    ]  # the prelude's and the coda's are ordinary: [s b n d] by [s 1 1 d]
    assert all(shape[1] == 1 and table == (shape[0], 1, 1, 8) for shape, table in inner)
    if policy == "recursion_wise" and isinstance(router, ExpertChoice):  # 3 sequences
        assert [shape[0] for shape, _ in inner[::4]] == [3 * 14, 3 * 9, 3 * 4]


@matrix(("expert", "recursion_wise"), ("token", "recursion_wise"), ("token", "recursive_sharing"))
def test_documents_are_packed_sequences_where_that_is_exact(
    stand_in_pool: WorkerPool, router: Any, policy: Any
) -> None:
    recursion = RecursionConfig(3, router=router, kv_policy=policy, sharing="cycle")
    local, engine = both(stand_in_pool, recursion, num_layers=6, with_documents=True)
    assert_same(local, engine)
    formats = [call.qkv_format for call in engine.attention]
    packed_steps = 3 if policy == "recursion_wise" else 1
    assert formats == ["thd"] * 2 * packed_steps
    for call in engine.attention[: 2 * packed_steps]:
        assert call.attn_mask_type == "padding_causal"
        assert call.cu_seqlens.shape == (3 * (3 + 1) + 1,)  # documents and padding of 3 sequences
        assert call.cu_seqlens[-1] == call.query[0]
    first = engine.attention[0].cu_seqlens.diff().view(3, 4)
    assert [(row > 0).sum() for row in first] == [1, 2, 3]  # and no padding at the first step


def test_ordinary_layers_keep_documents_apart_too(stand_in_pool: WorkerPool) -> None:
    """Transformer Engine's causal attention reads no mask."""
    recursion = RecursionConfig(3, router=ExpertChoice(alpha=0.5))
    local, engine = both(stand_in_pool, recursion, with_documents=True)
    assert_same(local, engine)
    prelude, coda = engine.attention[0], engine.attention[-1]
    assert [(prelude.qkv_format, prelude.query), (coda.qkv_format, coda.query)] == [
        ("thd", (3 * 14, 4, 8))
    ] * 2


@pytest.mark.parametrize("experts", [4, pytest.param(None, marks=pytest.mark.full)])
def test_gradients_of_all_steps_are_kept_where_the_engine_adds_them_up_itself(
    stand_in_pool: WorkerPool, experts: int | None
) -> None:
    """It writes a weight's first gradient over `main_grad`, which step 1's would not be."""
    recursion = RecursionConfig(3, router=ExpertChoice(alpha=0.5))
    plain, fused = (
        stand_in_pool.run(
            engine_models.run,
            recursion=recursion,
            engine=True,
            experts=experts,
            fused_gradients=flag,
        )[0]
        for flag in (False, True)
    )
    assert_same(plain, fused)


@pytest.mark.parametrize(
    ("recipe", "name", "rows"),
    [
        ("tensorwise", "Float8CurrentScaling", 16),
        pytest.param("blockwise", "Float8BlockScaling", 16, marks=pytest.mark.full),
        ("mxfp8", "MXFP8BlockScaling", 32),
    ],
)
def test_quantization_recipes_reach_the_shared_layers(
    stand_in_pool: WorkerPool, recipe: str, name: str, rows: int
) -> None:
    recursion = RecursionConfig(3, router=ExpertChoice(alpha=0.5))
    plain, quantized = (
        stand_in_pool.run(
            engine_models.run,
            recursion=recursion,
            engine=True,
            experts=4,
            batch=4,
            length=16,
            fp8=fp8,
            fp8_recipe=recipe,
        )[0]
        for fp8 in (None, "hybrid")
    )
    assert not plain.quantized_rows
    assert set(quantized.recipes) == {name}
    # Two ordinary layers and two shared ones three times, four products and experts each.
    assert len(quantized.quantized_rows) >= 2 * 4 + 6 * 4
    assert not any(count % rows for count in quantized.quantized_rows)
    assert_same(plain, quantized)  # the stand-in quantizes nothing


def refusal(**settings: Any) -> str:
    try:
        engine_models.run(RecursionConfig(3, router=ExpertChoice()), engine=True, **settings)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_delayed_scaling_is_refused(stand_in_pool: WorkerPool) -> None:
    """A module that runs twice within its context overwrites the amax that sets its scale."""
    (message,) = stand_in_pool.run(refusal, fp8="hybrid", fp8_recipe="delayed", batch=4, length=16)
    assert "fp8_recipe='delayed'" in message
    assert "'tensorwise'" in message


def test_calls_that_the_engine_would_refuse_are_refused() -> None:
    sys.path.insert(0, STAND_IN)
    try:
        from transformer_engine.signatures import VERSION, bound, recorded
    finally:
        sys.path.remove(STAND_IN)
    assert VERSION == "2.20.2"
    forward = bound("Linear.forward")(lambda self, given: given)
    assert forward(None, 1, is_first_microbatch=True) == {"inp": 1, "is_first_microbatch": True}
    with pytest.raises(TypeError, match=r"Linear\.forward of Transformer Engine 2\.20\.2"):
        forward(None, 1, first=True)
    assert "cu_seqlens_q" in recorded("DotProductAttention.forward").parameters
