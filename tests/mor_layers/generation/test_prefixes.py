"""Requests that share a prefix, against each of them alone."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from mor_layers import DepthAndWidth, ExpertChoice, FixedDepth, MoRTransformer
from mor_layers.generation import (
    CacheSettings,
    Request,
    Sampling,
    calibrate,
    turn_dial,
    with_early_exit,
)
from mor_layers.generation.cache import PagedRows
from mor_layers.recursion import KVPolicy
from mor_layers.routers import Confidence
from tests.mor_layers.generation.served import Recorder, assert_exact, prompt, serve
from tests.mor_layers.small_models import ROUTERS, plain_config, small_config, small_model
from tests.pairs import pairwise_sweep

ALL_ROUTERS = {**ROUTERS, "depth_and_width": DepthAndWidth()}
POLICIES: tuple[KVPolicy, ...] = (
    "recursion_wise",
    "recursive_sharing",
    "sharing_with_update",
    "exit_state",
)
SYSTEM = prompt(18, 7)
"""Tokens that many requests begin with: four blocks of four, and half of one."""


def model_for(router: str, policy: KVPolicy, sharing: str = "cycle") -> MoRTransformer:
    return small_model(small_config(ALL_ROUTERS[router], 3, sharing, policy))


def alike(*lengths: int) -> list[Request]:
    """Requests that begin with `SYSTEM` and end with so many tokens of their own."""
    return [Request((*SYSTEM, *prompt(n, 20 + n)), 6) for n in lengths]


def page_bytes(model: MoRTransformer) -> int:
    """Of a model whose layers all recur."""
    caches = Recorder(model).engine.caches
    return caches.num_bytes // caches.pages[1]


def assert_cleared(recorder: Recorder) -> None:
    """Once prefixes are forgotten, every page is free, and no list holds anything."""
    engine = recorder.engine
    engine.prefixes.clear()
    assert engine.prefixes.num_blocks_idle == 0
    for pages in (engine.caches.outer_pages, engine.caches.policy.pages):
        assert not pages.kept and pages.num_idle == 0
        assert sorted(pages.free_pages) == list(range(pages.num_pages))
        assert not pages.counts.any() and not pages.borrowed.any()


@pytest.mark.parametrize(
    ("router", "policy", "sharing"),
    pairwise_sweep(itertools.product(ALL_ROUTERS, POLICIES, ("cycle", "middle_cycle"))),
)
def test_shared_prefixes_change_nothing(router: str, policy: KVPolicy, sharing: str) -> None:
    model = model_for(router, policy, sharing)
    requests = alike(1, 7, 2, 2, 9)  # two of them are equal, and end with a block
    recorder = Recorder(model, num_slots=3, chunk_size=6)
    for request in requests:
        recorder.submit(request)
    for request, served in zip(requests, recorder.finish(), strict=True):
        assert_exact(model, request, served)
    first, *cached = [own.cached_tokens for own in recorder.served.values()]
    # The rows of exited tokens wait for a tick in which any token runs, and may miss the end.
    late = {12, 16} if policy == "exit_state" else {16}
    assert first == 0 and set(cached) <= late
    assert recorder.engine.counters.cached_tokens == sum(cached)
    computed = recorder.engine.counters.prompt_tokens
    assert computed == sum(len(request.ids) for request in requests) - sum(cached)
    assert recorder.engine.prefixes.num_blocks_idle > 0
    assert_cleared(recorder)


@pytest.mark.parametrize("config", [plain_config(3), small_config(sharing="sequence")])
def test_models_that_route_nothing_share_prefixes(config) -> None:
    model = small_model(config)
    recorder = Recorder(model, num_slots=2, chunk_size=6)
    requests = alike(1, 7, 3)
    for request in requests:
        recorder.submit(request)
    for request, served in zip(requests, recorder.finish(), strict=True):
        assert_exact(model, request, served)
    assert recorder.engine.counters.cached_tokens == 32
    assert_cleared(recorder)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_conversation_continues_from_its_own_answers(policy: KVPolicy) -> None:
    """Each turn begins with the turns before it, answers included."""
    model = model_for("expert_choice", policy, "middle_cycle")
    recorder = Recorder(model, num_slots=2, chunk_size=5)
    text, computed = list(prompt(6, 3)), 0
    for turn in range(4):
        request = Request((*text, *prompt(3, turn)), 7)
        recorder.submit(request)
        served = recorder.finish()[turn]
        assert_exact(model, request, served)
        # Of the previous turn, all full blocks; the states of its last tokens may not be stored
        # when it ends, and the last token is never run.
        missing = computed // 4 * 4 - served.cached_tokens
        assert missing == 0 or (policy == "exit_state" and missing == 4)
        text = [*request.ids, *served.tokens]
        computed = len(text) - 1
    assert_cleared(recorder)


@pytest.mark.parametrize("policy", ["recursion_wise", "exit_state"])
def test_a_prefix_that_several_wait_for_is_computed_once(policy: KVPolicy) -> None:
    model = model_for("expert_choice", policy)
    requests = alike(2, 4, 1, 5)
    recorder = Recorder(model, chunk_size=4)
    for request in requests:
        recorder.submit(request)
    recorder.step()
    recorder.step()
    assert recorder.engine.num_running == 4
    assert recorder.engine.cancel(0)  # it was computing for all
    served = recorder.finish()
    for request, own in zip(requests[1:], served[1:], strict=True):
        assert_exact(model, request, own)
    # What the first one had stored is not computed again, and the next one computes the rest.
    assert [own.cached_tokens for own in served[2:]] == [16, 16]
    assert recorder.engine.counters.prompt_tokens <= 8 + sum(len(r.ids) for r in requests) - 2 * 16
    assert_cleared(recorder)


def test_a_prefix_shared_by_all_lets_more_requests_run() -> None:
    model = model_for("fixed_depth", "recursion_wise")
    requests = [Request((*prompt(40), *prompt(2, n)), 6) for n in range(4)]
    # 36 pages hold one of them, and 6 hold what each adds to the prefix.
    arguments = {"kv_bytes": 90 * page_bytes(model), "num_slots": 4, "chunk_size": 4}
    most = {}
    for sharing in ("off", "all"):
        recorder = Recorder(model, prefix_sharing=sharing, **arguments)
        for request in requests:
            recorder.submit(request)
        most[sharing] = 0
        while not recorder.engine.is_idle:
            recorder.step()
            most[sharing] = max(most[sharing], recorder.engine.num_running)
        assert recorder.engine.counters.preemptions == 0
        for request, served in zip(requests, recorder.finish(), strict=True):
            assert_exact(model, request, served)
    assert most["off"] < 4 == most["all"]


@pytest.mark.parametrize("sharing", ["off", "client", "all"])
def test_who_shares_with_whom(sharing: str) -> None:
    model = model_for("fixed_depth", "recursion_wise")
    recorder = Recorder(model, num_slots=1, prefix_sharing=sharing)
    senders = [("a", ""), ("a", ""), ("b", ""), ("b", "x"), ("a", "x"), ("", ""), ("b", "x")]
    for client, salt in senders:
        recorder.submit(replace(alike(3)[0], client=client, cache_salt=salt))
        recorder.finish()
    hits = [own.cached_tokens > 0 for own in recorder.served.values()]
    assert (
        hits
        == {
            "off": [False] * 7,
            "client": [False, True, False, False, False, False, True],
            "all": [False, True, True, False, True, True, True],
        }[sharing]
    )
    assert_cleared(recorder)
    assert not recorder.engine.prefixes._roots


def change_in_place(model: MoRTransformer) -> None:
    with torch.no_grad():
        model.recursions[0].layers.layers[0].attention.key.weight.mul_(-1.0)


def replace_a_parameter(model: MoRTransformer) -> None:
    embedding = model.embedding
    embedding.weight = torch.nn.Parameter(embedding.weight.detach() * 1.5)


def move_thresholds(model: MoRTransformer) -> None:
    calibrate(model, [torch.tensor([SYSTEM])], dial=0.5)


@pytest.mark.parametrize(
    ("router", "change"),
    [
        (ExpertChoice(), change_in_place),
        (ExpertChoice(), replace_a_parameter),
        (ExpertChoice(), move_thresholds),
        (DepthAndWidth(), lambda model: turn_dial(model, depth=0.3)),
        (FixedDepth(), lambda model: with_early_exit(model, Confidence(0.08))),
    ],
)
def test_a_changed_model_shares_nothing_of_before(
    router, change: Callable[[MoRTransformer], None]
) -> None:
    model = small_model(small_config(router, 3, "cycle"))
    recorder, (request,) = Recorder(model), alike(3)
    for is_shared in (False, True):
        recorder.submit(request)
        assert (recorder.finish()[-1].cached_tokens > 0) == is_shared
    change(model)
    model.eval()
    recorder.submit(request)
    served = recorder.finish()[-1]
    assert served.cached_tokens == 0
    assert_exact(model, request, served)
    before = recorder.served[0]
    assert served.depths != before.depths or not torch.equal(served.logits[0], before.logits[0])
    recorder.submit(request)
    assert recorder.finish()[-1].cached_tokens == 20
    assert_cleared(recorder)


@pytest.mark.parametrize("policy", ["sharing_with_update", "exit_state"])
def test_a_sequence_under_way_when_the_model_changes_shares_nothing(policy: KVPolicy) -> None:
    model = model_for("expert_choice", policy)
    recorder, (request,) = Recorder(model, chunk_size=4), alike(3)
    recorder.submit(request)
    for _ in range(5):
        recorder.step()
    change_in_place(model)
    recorder.finish()
    recorder.submit(request)
    served = recorder.finish()[-1]
    assert served.cached_tokens == 0
    assert_exact(model, request, served)


def test_rows_that_are_not_finite_are_not_shared() -> None:
    model = model_for("expert_choice", "recursion_wise")
    recorder, (request,) = Recorder(model), alike(3)
    hook = model.embedding.register_forward_hook(lambda _, __, out: out * torch.nan)
    recorder.submit(request)
    assert recorder.finish()[-1].finish_reason == "error"
    hook.remove()
    recorder.submit(request)
    served = recorder.finish()[-1]
    assert served.cached_tokens == 0
    assert_exact(model, request, served)
    assert_cleared(recorder)


def test_scored_prompts_are_computed_whole() -> None:
    model = model_for("expert_choice", "recursion_wise")
    recorder, (request,) = Recorder(model), alike(3)
    recorder.submit(request)
    recorder.finish()
    recorder.submit(replace(request, num_logprobs=0, prompt_logprobs=True))
    served = recorder.finish()[-1]
    assert served.cached_tokens == 0
    assert_exact(model, request, served)


@pytest.mark.parametrize("policy", POLICIES)
def test_8_bit_rows_are_shared_as_they_are(policy: KVPolicy) -> None:
    model = model_for("expert_choice", policy)
    requests = alike(1, 7, 3)
    alone = [serve(model, [request], is_int8=True, chunk_size=4)[0] for request in requests]
    shared = serve(model, requests, is_int8=True, chunk_size=4)
    assert [own.cached_tokens for own in shared] == [0, 16, 16]
    for one, other in zip(alone, shared, strict=True):
        torch.testing.assert_close(one.logits[0], other.logits[0], rtol=0, atol=1e-4)
        assert one.depths[:16] == other.depths[:16]


def pages_used_alone(model: MoRTransformer, request: Request) -> int:
    recorder = Recorder(model, prefix_sharing="off")
    recorder.submit(request)
    used = 0
    while not recorder.engine.is_idle:
        recorder.step()
        used = max(used, recorder.engine.caches.policy.pages.pages_in_use)
    return used


def test_a_sequence_that_fits_alone_fits_with_a_prefix_of_others() -> None:
    """Rows of many writers occupy more pages than those of one. Then the sequence shares none."""
    model = model_for("expert_choice", "recursion_wise")
    text = prompt(40, 1)
    long = Request(text, 8)
    num_pages = pages_used_alone(model, long)
    few = (1.0, 0.3, 0.2)  # admits it, whatever it turns out to need
    recorder = Recorder(model, kv_bytes=num_pages * page_bytes(model), shares=few, max_length=64)
    assert recorder.engine.caches.pages == (0, num_pages)
    for length in range(5, 41, 5):
        recorder.submit(Request(text[:length], 1))
        recorder.finish()
    recorder.submit(long)
    served = recorder.finish()[-1]
    assert served.finish_reason == "length"
    assert recorder.engine.counters.preemptions == 1 and served.cached_tokens == 0
    assert_exact(model, long, served)
    assert_cleared(recorder)


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end() -> None:
    model = model_for("fixed_depth", "recursive_sharing")
    recorder = Recorder(model, kv_bytes=11 * page_bytes(model), num_slots=1)

    def cached(seed: int, length: int = 17) -> int:
        recorder.submit(Request(prompt(length, seed), 1))
        return recorder.finish()[-1].cached_tokens

    assert cached(1) == 0 and cached(2) == 0  # four pages each stay
    assert cached(1) == 16  # used again, so the other one is the oldest
    assert cached(3, 13) == 0  # needs four pages, and there are three
    assert cached(1) == 16 and cached(2) == 12
    assert_cleared(recorder)


def soak(policy: KVPolicy, count: int, seed: int = 0, **arguments) -> Recorder:
    """Requests with few beginnings come in bursts into too few pages; some are cancelled."""
    rng = random.Random(seed)
    model = model_for("expert_choice", policy, "middle_cycle")
    beginnings = [prompt(length, length) for length in (8, 13, 21, 30)]
    recorder = Recorder(
        model, kv_bytes=24_000, num_slots=5, chunk_size=6, shares=(0.5, 0.2, 0.1), **arguments
    )
    requests: list[Request] = []
    while len(requests) < count or not recorder.engine.is_idle:
        for _ in range(rng.randrange(1, 5) if rng.random() < 0.4 and len(requests) < count else 0):
            ids = (*rng.choice(beginnings), *prompt(rng.randrange(6), rng.randrange(3)))
            if requests and rng.random() < 0.3:  # a conversation goes on
                number = rng.randrange(len(requests))
                ids = (*requests[number].ids, *recorder.served[number].tokens, 1)[:44]
            client = rng.choice(["", "a", "b"])
            request = Request(ids, rng.choice([1, 4, 15]), Sampling(0.8), client=client)
            recorder.submit(request)
            requests.append(request)
        if requests and rng.random() < 0.1:
            recorder.engine.cancel(rng.randrange(len(requests)))
        if rng.random() < 0.01:
            recorder.engine.prefixes.clear()
        recorder.step()
    served = recorder.finish()
    assert recorder.engine.counters.preemptions > 0 < recorder.engine.counters.cached_tokens
    assert_cleared(recorder)
    assert_all_exact(model, requests, served)
    return recorder


def assert_all_exact(model: MoRTransformer, requests: Sequence[Request], served) -> None:
    for request, own in zip(requests, served, strict=True):
        assert own.finish_reason in ("length", "cancelled")
        if own.tokens:
            assert_exact(model, request, own)


@pytest.mark.parametrize("policy", ["recursive_sharing", "exit_state"])
def test_shared_prefixes_in_too_few_pages(policy: KVPolicy) -> None:
    soak(policy, 40)


@pytest.mark.full
@pytest.mark.parametrize("policy", POLICIES)
def test_a_thousand_requests_that_share_prefixes(policy: KVPolicy) -> None:
    soak(policy, 1000, seed=1)


def test_borrowed_rows_are_not_freed_and_own_ones_follow_them() -> None:
    pages = PagedRows(num_pages=8, page_size=4, num_lists=2, max_rows=20)
    first, second = torch.tensor([0]), torch.tensor([1])
    _, rows = pages.append(first.repeat(6))
    pages.row_of[1, :5] = rows[:5]
    pages.borrow(second, torch.tensor([5]))
    assert pages.pages_needed(second.repeat(4)) == 1 and pages.pages_needed(second.repeat(5)) == 2
    places, own = pages.append(second.repeat(5))
    assert places.tolist() == [5, 6, 7, 8, 9]
    assert not set(own.tolist()) & set(range(0, 8)) and len(set((own // 4).tolist())) == 2
    assert pages.row_of[1, :10].tolist() == [*rows[:5].tolist(), *own.tolist()]
    pages.kept.update((rows // 4).tolist())
    pages.release(first)
    assert pages.pages_free == 4
    pages.release(second)
    assert pages.pages_free == 6
    pages.discard(list(pages.kept))
    assert sorted(pages.free_pages) == list(range(8)) and not pages.kept


def test_settings_name_what_may_be_shared() -> None:
    with pytest.raises(
        ValueError, match="prefix_sharing='some' must be one of 'off', 'client', 'all'"
    ):
        CacheSettings(1, prefix_sharing="some")  # type: ignore[arg-type]
