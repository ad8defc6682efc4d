"""Bookkeeping, bytes, and attention to rows of a cache, each against plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor_layers import ExpertChoice
from mor_layers.costs import account
from mor_layers.cpu_kernels import without_cpu_kernels
from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request
from mor_layers.generation.cache import (
    CachedAttention,
    KVArena,
    PagedRows,
    Visible,
    is_read_by_kernel,
)
from mor_layers.generation.cache.attention import (
    GatheredAttention,
    IndexedAttention,
    PagedAttention,
)
from mor_layers.generation.cache.memory import EightBits
from mor_layers.generation.tick.runner import ModelRunner
from mor_layers.recursion import KVPolicy
from tests.mor_layers.generation.served import Recorder, prompt
from tests.mor_layers.small_models import small_config, small_model
from tests.oracles import loops as reference

POLICIES: tuple[KVPolicy, ...] = (
    "recursion_wise",
    "recursive_sharing",
    "sharing_with_update",
    "exit_state",
)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[str, list[int]]]]:
    """Page size; what is appended to, or released from, six lists in turn."""
    lists = st.lists(st.integers(0, 5), max_size=8)
    event = st.tuples(st.sampled_from(["append", "append", "release"]), lists)
    return draw(st.integers(1, 4)), draw(st.lists(event, max_size=12))


@given(histories())
def test_rows_are_handed_out_once_and_come_back(history) -> None:
    page_size, events = history
    pages = PagedRows(num_pages=60, page_size=page_size, num_lists=6, max_rows=100)
    expected: list[list[int]] = [[] for _ in range(6)]
    for what, lists in events:
        if what == "release":
            pages.release(torch.tensor(sorted(set(lists)), dtype=torch.long))
            for number in set(lists):
                expected[number] = []
            continue
        before = pages.pages_free
        wanted = pages.pages_needed(torch.tensor(lists, dtype=torch.long))
        if wanted > before:
            continue
        are_distinct = len(set(lists)) == len(lists)
        places, rows = pages.append(torch.tensor(lists, dtype=torch.long), are_distinct)
        assert pages.pages_free == before - wanted
        for number, place, row in zip(lists, places.tolist(), rows.tolist(), strict=True):
            assert place == len(expected[number])
            expected[number].append(row)
        held = [row for rows in expected for row in rows]
        assert len(set(held)) == len(held), "a row belongs to one list"
        for number, rows in enumerate(expected):
            assert pages.row_of[number, : len(rows)].tolist() == rows
    assert pages.counts.tolist() == [len(rows) for rows in expected]
    assert pages.pages_in_use == sum(pages.pages_for(len(rows)) for rows in expected)


@pytest.mark.parametrize(
    ("dtype", "eight_bits"),
    [
        (torch.float32, None),
        (torch.float32, "int8"),
        (torch.float32, "fp8"),
        (torch.bfloat16, None),
        (torch.float64, None),
    ],
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (3, 3), (6, 1)])
def test_all_ways_of_attention_equal_a_loop(
    num_heads: int, num_kv_heads: int, dtype: torch.dtype, eight_bits: EightBits | None
) -> None:
    torch.manual_seed(0)
    arena = KVArena(2, 40, num_kv_heads, 8, dtype, eight_bits=eight_bits)
    rows = torch.arange(40)
    arena.write(1, rows, *torch.randn(2, 40, num_kv_heads, 8, dtype=dtype))
    arena.write(0, rows, *torch.randn(2, 40, num_kv_heads, 8, dtype=dtype))  # another layer
    # Three single tokens, a span of five whose tokens see ever more, and another one.
    lengths = [1, 1, 5, 1]
    counts = torch.tensor([3, 11, 2, 3, 4, 7, 8, 1])
    lists = torch.tensor([3, 0, 1, 1, 1, 1, 1, 2])
    table = torch.stack([torch.randperm(40)[:12] for _ in range(4)])
    query = torch.randn(8, num_heads, 8).to(dtype)
    visible = Visible(table, lists, counts)
    exact, wide = arena.gather(1, rows).double(), query.double()
    expected = []
    for i, (number, count) in enumerate(zip(lists, counts, strict=True)):
        key, value = exact[table[number, :count]].unbind(1)
        expected.append(reference.attention(wide[i : i + 1], [99], key, value, list(range(count))))
    expected = torch.cat(expected)
    tolerance = 1e-5 if dtype.itemsize >= 4 else 2e-2  # bf16 has eight bits of precision
    ways = {
        "indexed": IndexedAttention(visible, arena, num_heads),
        "gathered": GatheredAttention(visible, torch.tensor(lengths)),
        "chosen": CachedAttention(visible, lists, arena, num_heads),
    }
    with without_cpu_kernels():
        ways["mixed"] = CachedAttention(visible, lists, arena, num_heads)
    for name, attention in ways.items():
        for layer in (0, 1):  # what a layer leaves behind must not reach the next
            out = attention(arena, layer, query)
        assert out.dtype == dtype
        torch.testing.assert_close(
            out.double(),
            expected,
            rtol=tolerance,
            atol=tolerance,
            msg=name,
        )


@pytest.mark.parametrize("eight_bits", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_vectors", [1, 2])
@pytest.mark.parametrize("head_size", [20, 64, 128])
def test_the_kernel_equals_pytorch(
    head_size: int, num_vectors: int, dtype: torch.dtype, eight_bits: EightBits | None
) -> None:
    """In blocks of 64 rows and tiles of 16 tokens, some of them incomplete; one token sees nothing."""
    torch.manual_seed(0)
    arena = KVArena(1, 300, 2, head_size, dtype, "cpu", eight_bits, num_vectors)
    assert is_read_by_kernel(arena)
    key, value = torch.randn(2, 300, 2, head_size, dtype=dtype)
    arena.write(0, torch.arange(300), key, value if num_vectors == 2 else None)
    table = torch.randperm(300)[None, :200].repeat(3, 1)
    lists = torch.tensor([0] * 19 + [1, 2, 2, 0])
    counts = torch.tensor([*range(110, 129), 64, 65, 199, 0])
    query = torch.randn(23, 6, head_size).to(dtype)
    query[4] *= 5  # one row outweighs all others
    visible = Visible(table, lists, counts)
    out = PagedAttention(visible)(arena, 0, query)
    with without_cpu_kernels():
        seen = Visible(table, lists[:-1], counts[:-1])
        expected = CachedAttention(seen, lists[:-1], arena, 6)(arena, 0, query[:-1])
    assert out.dtype == dtype and (out[-1] == 0).all()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # bf16 has eight bits of precision
    torch.testing.assert_close(out[:-1], expected, rtol=tolerance, atol=tolerance)


def test_the_kernel_passes_on_what_is_not_a_number() -> None:
    """A request whose states are not finite must be found out, and no other one changed."""
    arena = KVArena(1, 4, 1, 8)
    arena.data.normal_()
    query = torch.randn(3, 2, 8)
    visible = Visible(torch.arange(4)[None].repeat(3, 1), torch.arange(3), torch.tensor([4, 4, 4]))
    expected = PagedAttention(visible)(arena, 0, query)
    query[1] = float("nan")
    out = PagedAttention(visible)(arena, 0, query)
    assert out[1].isnan().all() and torch.equal(out[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("eight_bits", ["int8", "fp8"])
def test_8_bit_rows_are_within_half_a_step(eight_bits: EightBits) -> None:
    arena = KVArena(1, 5, 2, 8, eight_bits=eight_bits)
    heads = torch.randn(2, 5, 2, 8)
    heads[0, 3] = 0
    arena.write(0, torch.arange(5), *heads)
    rows = arena.gather(0, torch.arange(5)).transpose(0, 1)
    largest = heads.abs().amax(-1, keepdim=True)
    step = largest / 127
    if eight_bits == "fp8":  # three bits behind the leading one, of numbers down to 2^-6
        step = torch.maximum(heads.abs() / 8, largest / 448 * 2**-9)
    assert ((rows - heads).abs() <= step / 2 + 1e-6).all()
    assert arena.num_bytes == 5 * KVArena.bytes_per_row(1, 2, 8, torch.float32, eight_bits)


@pytest.mark.parametrize("eight_bits", [{}, {"is_int8": True}, {"is_fp8": True}])
@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_are_those_allocated(
    policy: KVPolicy, sharing: str, eight_bits: dict[str, bool]
) -> None:
    model = small_model(small_config(ExpertChoice(), 3, sharing, policy, block_size=2))
    for kv_bytes in (20_000, 100_001):
        settings = CacheSettings(kv_bytes, 3, 50, page_size=4, **eight_bits)
        caches = ModelRunner(model, settings, 8).caches
        tensors = [a.data for a in (caches.outer, caches.inner)]
        tensors += [a.scales for a in (caches.outer, caches.inner) if a.scales is not None]
        assert caches.num_bytes == sum(t.numel() * t.element_size() for t in tensors)
        assert kv_bytes * 0.9 < caches.num_bytes <= kv_bytes
        assert caches.num_bytes_in_use == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sequence_holds_what_its_policy_keeps(policy: KVPolicy) -> None:
    model = small_model(small_config(ExpertChoice(), 3, "middle_cycle", policy, block_size=2))
    recorder = Recorder(model, page_size=1)
    recorder.submit(Request(prompt(20), 30))
    while len(recorder.served[0].tokens) < 10:
        recorder.step()
    depths = list(recorder.served[0].depths)
    ran = [sum(depth > step for depth in depths) for step in range(3)]
    exited = sum(depth < 3 for depth in depths)
    rows = {
        "recursion_wise": sum(ran),
        "recursive_sharing": ran[0],
        "sharing_with_update": sum(ran),
        "exit_state": sum(ran) + exited,
    }[policy]
    runner = recorder.engine.runner
    row = 2 * 6 * 4  # keys and values of one head of 6 numbers, in fp32
    pending = sum(len(rows) for rows in runner.cached.unstored)
    in_use = row * (2 * len(depths) + 2 * (rows - pending))
    assert runner.caches.num_bytes_in_use == in_use
    if policy != "exit_state":
        cost = account(model.config, len(depths), ran)
        assert runner.caches.num_bytes_in_use == cost.kv_bytes(bytes_per_number=4)


@pytest.mark.parametrize("num_recursions", [2, 3, 4])
def test_expected_bytes_are_the_published_shares_of_a_full_cache(num_recursions: int) -> None:
    length = 48  # divides evenly
    rows = {}
    for policy in ("recursion_wise", "recursive_sharing"):
        config = small_config(ExpertChoice(), num_recursions, "cycle", policy)
        runner = ModelRunner(small_model(config), CacheSettings(1 << 20, page_size=1), 8)
        rows[policy] = runner.caches.demand(length)[1] / (num_recursions * length)
    assert rows["recursion_wise"] == pytest.approx((num_recursions + 1) / (2 * num_recursions))
    assert rows["recursive_sharing"] == pytest.approx(1 / num_recursions)


def test_less_than_a_page_is_an_error() -> None:
    with pytest.raises(ValueError, match="less than one page"):
        ModelRunner(small_model(small_config()), CacheSettings(100), 8)
    with pytest.raises(ValueError, match="page_size=0 must be at least 1"):
        CacheSettings(100, page_size=0)
    with pytest.raises(ValueError, match="3 entries, one per step"):
        ModelRunner(small_model(small_config()), CacheSettings(1 << 20, shares=(1.0,)), 8)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("block_size", [1, 3])
def test_memory_for_all_steps_does_not_run_out(policy, block_size) -> None:
    router = ExpertChoice(capacity_factors=(1.0, 1.0, 1.0))  # everyone runs every step
    model = small_model(small_config(router, kv_policy=policy, block_size=block_size))
    settings = CacheSettings.for_all_steps(model, max_length=23, num_slots=3)
    engine = DepthBatchingEngine(model, settings)
    for size in (1, 7, 18):
        engine.submit(Request(tuple(prompt(size)), 23 - size))
    reasons = [event.finish_reason for event in engine.run() if event.finish_reason]
    assert reasons == ["length"] * 3
    assert engine.counters.preemptions == 0
