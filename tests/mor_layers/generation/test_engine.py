"""The engine against full forward passes, whatever else is in flight."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mor_layers import (
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    MoEConfig,
    MoRTransformer,
    RouterConfig,
)
from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request, Sampling, calibrate
from mor_layers.recursion import KVPolicy
from tests.mor_layers.generation.served import Recorder, assert_exact, prompt, serve
from tests.mor_layers.small_models import (
    ROUTERS,
    VOCAB_SIZE,
    plain_config,
    random_ids,
    small_config,
    small_model,
)
from tests.pairs import pairwise_sweep

ALL_ROUTERS = {**ROUTERS, "depth_and_width": DepthAndWidth()}
POLICIES: tuple[KVPolicy, ...] = (
    "recursion_wise",
    "recursive_sharing",
    "sharing_with_update",
    "exit_state",
)
SHARINGS = ("cycle", "middle_cycle")


def model_for(router: str, policy: KVPolicy, sharing: str = "cycle", **changes) -> MoRTransformer:
    config = small_config(ALL_ROUTERS[router], 3, sharing, policy, **changes)
    return small_model(config)


def others(model: MoRTransformer, recorder: Recorder) -> None:
    """Requests that are under way, each elsewhere."""
    for seed, length in enumerate((1, 6, 3), start=10):
        recorder.submit(Request(prompt(length, seed), 4))
        recorder.step()


@pytest.mark.parametrize(
    ("router", "policy", "sharing"),
    pairwise_sweep(itertools.product(ALL_ROUTERS, POLICIES, SHARINGS)),
)
def test_decoding_equals_the_full_forward_pass(router: str, policy: KVPolicy, sharing: str) -> None:
    model = model_for(router, policy, sharing, block_size=2)
    request = Request(prompt(9), 5)
    in_company = Recorder(model, chunk_size=4)
    others(model, in_company)
    number = in_company.submit(request)
    ways = {
        "prefill at once": serve(model, [request])[0],
        "token by token": serve(model, [request], chunk_size=1)[0],
        "in chunks, with others in flight": in_company.finish()[number],
    }
    for served in ways.values():
        assert_exact(model, request, served)
    assert len({tuple(served.tokens) for served in ways.values()}) == 1


@pytest.mark.parametrize(
    ("router", "policy", "ends"),
    [
        ("expert_choice", "recursion_wise", (2, 3)),
        ("token_choice", "exit_state", (0, 2)),
        ("depth_and_width", "recursive_sharing", (3, 0)),
    ],
)
def test_a_prelude_and_a_coda_of_any_length(router: str, policy: KVPolicy, ends) -> None:
    model = model_for(router, policy, block_size=2, ends=ends)
    requests = [Request(prompt(length, length), 4) for length in (3, 8, 1)]
    for request, served in zip(requests, serve(model, requests, chunk_size=5), strict=True):
        assert_exact(model, request, served)


@pytest.mark.parametrize("policy", POLICIES[:3])
@pytest.mark.parametrize("router", ALL_ROUTERS)
def test_steps_with_norms_of_their_own(router: str, policy: KVPolicy) -> None:
    model = model_for(router, policy, share_norms=False)
    requests = [Request(prompt(length, length), 4) for length in (3, 8, 1)]
    for request, served in zip(requests, serve(model, requests, chunk_size=5), strict=True):
        assert_exact(model, request, served)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(plain_config(3), id="plain"),
        pytest.param(small_config(ends=(2, 3)), id="ends"),
        pytest.param(small_config(sharing="sequence", ends=(0, 2)), id="coda alone"),
        *(
            pytest.param(small_config(sharing=sharing, share_norms=norms, block_size=2), id=name)
            for sharing, norms, name in (
                ("sequence", True, "sequence"),
                ("middle_sequence", False, "middle_sequence"),
            )
        ),
    ],
)
def test_models_that_route_nothing(config) -> None:
    model = small_model(config)
    requests = [Request(prompt(length, length), 5) for length in (2, 9, 1)]
    for request, served in zip(requests, serve(model, requests, chunk_size=4), strict=True):
        assert_exact(model, request, served)


@pytest.mark.parametrize("expert_routers", ["shared", "per_step"])
@pytest.mark.parametrize("mean_experts", [None, 1.5])
def test_mixtures_of_experts(expert_routers: str, mean_experts: float | None) -> None:
    config = small_config(DepthAndWidth(), 3, "cycle", "exit_state")
    assert config.recursion is not None
    router = DepthAndWidth(mean_experts=mean_experts)
    recursion = replace(config.recursion, router=router, expert_routers=expert_routers)
    experts = MoEConfig(4, 2, bias_update_rate=0.1)
    model = small_model(replace(config, moe=experts, recursion=recursion))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.copy_(torch.randn(buffer.shape) * 0.2)
            elif "widths" in name:
                buffer.fill_(0.2)
    requests = [Request(prompt(length, length), 4) for length in (2, 7, 1)]
    for request, served in zip(requests, serve(model, requests, chunk_size=4), strict=True):
        assert_exact(model, request, served)


def test_experts_that_drop_tokens_are_refused() -> None:
    config = replace(small_config(), moe=MoEConfig(4, 2, capacity_factor=1.0))
    with pytest.raises(ValueError, match="lets experts drop tokens"):
        DepthBatchingEngine(small_model(config), CacheSettings(1 << 20))


def any_router(num_recursions: int) -> st.SearchStrategy[RouterConfig]:
    shares = st.lists(st.floats(0.1, 1.0), min_size=num_recursions, max_size=num_recursions)
    expert_choice = st.builds(
        ExpertChoice,
        alpha=st.floats(0.1, 2.0),
        activation=st.sampled_from(["sigmoid", "tanh", "none"]),
        capacity_factors=shares.map(lambda values: tuple(sorted(values, reverse=True))),
        predictor=st.sampled_from(["aux_loss", "aux_router"]),
        combine=st.sampled_from(["weighted", "additive"]),
        threshold=st.floats(0.2, 0.8),
    )
    settled = [ALL_ROUTERS["token_choice"], ALL_ROUTERS["random_depth"], FixedDepth()]
    if num_recursions > 1:
        settled.append(DepthAndWidth())
    return st.one_of(expert_choice, st.sampled_from(settled))


@st.composite
def any_model(draw: st.DrawFn) -> MoRTransformer:
    steps = draw(st.integers(1, 4))
    policy = draw(st.sampled_from(POLICIES))
    config = small_config(
        draw(any_router(steps)),
        steps,
        draw(st.sampled_from(SHARINGS)),
        policy,
        share_norms=policy == "exit_state" or draw(st.booleans()),
        block_size=draw(st.integers(1, 2)),
    )
    return small_model(config, seed=draw(st.integers(0, 1000)))


def check_causality(model: MoRTransformer, length: int, place: int, change: int) -> None:
    ids = random_ids(2, length, seed=length)
    changed = ids.clone()
    changed[0, place] = (ids[0, place] + change) % VOCAB_SIZE
    with torch.no_grad():
        before, after = (model.eval()(i, causal_routing=True) for i in (ids, changed))
    assert torch.equal(before.depths[0, :place], after.depths[0, :place])
    torch.testing.assert_close(
        before.logits[0, :place], after.logits[0, :place], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(before.logits[1], after.logits[1], rtol=1e-5, atol=1e-5)


CAUSALITY = {
    "model": any_model(),
    "length": st.integers(1, 12),
    "place": st.integers(0, 11),
    "change": st.integers(1, VOCAB_SIZE - 1),
}


@given(**CAUSALITY)
@settings(max_examples=60)
def test_no_token_sees_its_future(model, length, place, change) -> None:
    check_causality(model, length, place % length, change)


@pytest.mark.full
@given(**CAUSALITY)
@settings(max_examples=600)
def test_no_token_sees_its_future_in_many_models(model, length, place, change) -> None:
    check_causality(model, length, place % length, change)


@st.composite
def any_company(draw: st.DrawFn) -> dict:
    """Requests, when they come, and how the engine is cut."""
    count = draw(st.integers(1, 6))
    samplings = st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        top_k=st.sampled_from([0, 3]),
        top_p=st.sampled_from([1.0, 0.8]),
    )
    return {
        "requests": [
            Request(
                prompt(draw(st.integers(1, 12)), seed), draw(st.integers(1, 6)), draw(samplings)
            )
            for seed in range(count)
        ],
        "arrivals": [draw(st.integers(0, 8)) for _ in range(count)],
        "chunk_size": draw(st.integers(1, 8)),
        "num_slots": draw(st.integers(1, 4)),
        "page_size": draw(st.sampled_from([1, 3, 8])),
        "tokens_per_tick": draw(st.integers(1, 20)),
    }


def check_company(model: MoRTransformer, company: dict) -> None:
    requests, arrivals = company.pop("requests"), company.pop("arrivals")
    recorder = Recorder(model, **company)
    order = sorted(range(len(requests)), key=lambda i: arrivals[i])
    tick = 0
    for index in order:
        while tick < arrivals[index]:
            recorder.step()
            tick += 1
        recorder.submit(requests[index])
    for number, served in enumerate(recorder.finish()):
        request = requests[order[number]]
        assert served.finish_reason == "length"
        assert len(served.tokens) == request.max_new_tokens
        assert_exact(model, request, served)


@given(any_model(), any_company())
@settings(max_examples=40)
def test_neither_neighbours_nor_arrival_change_a_request(model, company) -> None:
    check_company(model, company)


@pytest.mark.full
@given(any_model(), any_company())
@settings(max_examples=500)
def test_neither_neighbours_nor_arrival_change_a_request_in_many_models(model, company) -> None:
    check_company(model, company)


@pytest.mark.parametrize("router", ["expert_choice", "expert_choice_first_step_too"])
@pytest.mark.parametrize("policy", POLICIES)
def test_sequences_that_give_way_say_the_same(policy: KVPolicy, router: str) -> None:
    model = model_for(router, policy, "middle_cycle")
    calibrate(model, [random_ids(8, 32)])
    requests = [Request(prompt(4, seed), 20) for seed in range(6)]
    roomy = serve(model, requests, num_slots=6)
    # Admitted as if few tokens ran the deeper steps, which is wrong on purpose.
    tight = Recorder(model, kv_bytes=24_000, num_slots=6, shares=(0.3, 0.02, 0.02))
    for request in requests:
        tight.submit(request)
    assert [s.tokens for s in tight.finish()] == [s.tokens for s in roomy]
    assert tight.engine.counters.preemptions > 0
    for request, served in zip(requests, tight.served.values(), strict=True):
        assert_exact(model, request, served)


def test_a_single_sequence_that_outgrows_the_cache_ends_with_a_reason() -> None:
    model = model_for("fixed_depth", "recursion_wise")
    recorder = Recorder(model, kv_bytes=8_000, shares=(0.1, 0.1, 0.1))
    recorder.submit(Request(prompt(4), 50))
    (served,) = recorder.finish()
    assert served.finish_reason == "memory" and 0 < len(served.tokens) < 50


def test_a_client_with_many_requests_makes_room_for_another() -> None:
    model = model_for("expert_choice", "sharing_with_update", "middle_cycle")
    now = [0.0]
    recorder = Recorder(model, num_slots=2, clock=lambda: now[0])
    many = [Request(prompt(3, seed), 20, client="many") for seed in range(4)]
    for request in many:
        recorder.submit(request)
    for _ in range(8):
        recorder.step()
    short = Request(prompt(2, 9), 2, client="one")
    number = recorder.submit(short)
    now[0] += 1.0
    while recorder.served[number].finish_reason is None:
        recorder.step()
    assert recorder.engine.counters.finished == recorder.engine.counters.preemptions == 1
    for request, served in zip((*many, short), recorder.finish(), strict=True):
        assert len(served.tokens) == request.max_new_tokens
        assert_exact(model, request, served)


def test_a_token_that_exits_makes_room_at_once() -> None:
    model = model_for("expert_choice_first_step_too", "recursion_wise")
    recorder = Recorder(model, num_slots=1)
    for seed in range(3):
        recorder.submit(Request(prompt(1, seed), 3))
    served = recorder.finish()
    # A tick a step, a token that takes none included.
    ticks = sum(max(1, depth) for s in served for depth in s.depths)
    assert recorder.engine.counters.ticks == ticks
    assert recorder.engine.counters.steps == sum(sum(s.depths) for s in served)


def test_a_long_prompt_does_not_stop_the_others() -> None:
    model = model_for("fixed_depth", "recursion_wise")
    recorder = Recorder(model, chunk_size=2, num_slots=2)
    first = recorder.submit(Request(prompt(1), 30))
    recorder.step()
    second = recorder.submit(Request(prompt(20, 1), 1))
    while recorder.served[second].finish_reason is None:
        recorder.step()
    assert len(recorder.served[first].tokens) >= 10


@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
@pytest.mark.parametrize("policy", POLICIES)
def test_logits_that_are_not_finite_end_their_own_request(policy: KVPolicy, router: str) -> None:
    model = model_for(router, policy, "middle_cycle")
    prompts = [tuple(i % 4 for i in prompt(length, length)) for length in (3, 9, 1, 4, 7)]
    good = [Request(ids, 6) for ids in prompts]
    alone = serve(model, good)
    said = {0, 1, 2, 3}.union(*(own.tokens for own in alone))
    broken = next(i for i in range(VOCAB_SIZE) if i not in said)
    # A token whose state is NaN, from its embedding on.
    model.embedding.register_forward_hook(
        lambda _, given, out: out.masked_fill((given[0] == broken)[..., None], torch.nan)
    )
    recorder = Recorder(model, num_slots=3, chunk_size=4)
    bad = Request((0, broken, 1, broken), 6)
    for request in (*good, bad):
        recorder.submit(request)
    served = recorder.finish()  # no page is left in use
    assert served[-1].finish_reason == "error" and "not finite" in served[-1].error
    assert [own.tokens for own in served[:-1]] == [own.tokens for own in alone]
    # Pages that held NaN are taken again, by whoever comes next.
    for request, expected in zip(good, alone, strict=True):
        tokens = [event.token for event in recorder.engine.stream(request)]
        assert tokens == expected.tokens


def test_a_text_that_cannot_be_decoded_ends_its_own_request() -> None:
    model = model_for("fixed_depth", "recursion_wise")
    requests = [Request((first,), 6, Sampling(1.0)) for first in range(3)]
    alone = serve(model, requests)
    broken = set(alone[0].tokens) - {i for own in alone[1:] for i in own.tokens}

    def decode(ids) -> str:
        if not broken.isdisjoint(ids):
            raise KeyError("no such token")
        return "".join(chr(ord("a") + i) for i in ids)

    assert broken
    recorder = Recorder(model, decode=decode)
    for request in requests:
        recorder.submit(request)
    served = recorder.finish()
    assert [own.finish_reason for own in served] == ["error", "length", "length"]
    assert [own.tokens for own in served[1:]] == [own.tokens for own in alone[1:]]
    # What is held back is decoded at the end, for whatever reason that comes.
    number = recorder.engine.submit(requests[1])
    while not recorder.engine.step():
        pass
    broken |= set(range(VOCAB_SIZE))
    assert recorder.engine.cancel(number)
    (end,) = recorder.engine.step()
    assert end.finish_reason == "error" and "KeyError" in end.error and recorder.engine.is_idle


def test_cancelled_and_late_requests_leave_nothing_behind() -> None:
    model = model_for("expert_choice", "exit_state", "middle_cycle")
    now = [0.0]
    recorder = Recorder(model, num_slots=2, clock=lambda: now[0])
    lasting = recorder.submit(Request(prompt(5), 8))
    cancelled = recorder.submit(Request(prompt(6, 1), 8))
    late = recorder.submit(Request(prompt(3, 2), 8, timeout=2.0))
    for _ in range(4):
        recorder.step()
        now[0] += 1.0
    assert recorder.engine.cancel(cancelled)
    assert not recorder.engine.cancel(cancelled)
    served = recorder.finish()
    assert served[cancelled].finish_reason == "cancelled"
    assert served[late].finish_reason == "timeout"
    assert served[lasting].finish_reason == "length"
    assert_exact(model, Request(prompt(5), 8), served[lasting])


def test_what_can_never_be_served_is_refused_with_a_reason() -> None:
    model = model_for("fixed_depth", "recursion_wise")
    engine = DepthBatchingEngine(model, CacheSettings(6_000, 2, max_length=64, page_size=4))
    for request, reason in (
        (Request((1, VOCAB_SIZE), 4), "vocabulary"),
        (Request(prompt(60), 10), "exceed max_length=64"),
        (Request(prompt(30), 30), "larger kv_bytes"),
        (Request((1,), 3, stop=("x",)), "decode"),
        (Request((1,), 3, Sampling(logit_bias=((VOCAB_SIZE, 1.0),))), "logit_bias has token ids"),
        (Request((1,), 3, num_logprobs=VOCAB_SIZE + 1), "exceeds the vocabulary"),
    ):
        with pytest.raises(ValueError, match=reason):
            engine.submit(request)
    for arguments, reason in (
        ({"ids": ()}, "ids is empty"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"timeout": 0.0}, "above 0"),
        ({"stop": ("",)}, "empty string"),
        ({"num_logprobs": -1}, "0 or more"),
        ({"prompt_logprobs": True}, "needs num_logprobs"),
    ):
        with pytest.raises(ValueError, match=reason):
            Request(**{"ids": (1,), "max_new_tokens": 1} | arguments)
    assert engine.is_idle


def test_stop_ids_and_stop_strings_end_a_text() -> None:
    model = model_for("expert_choice", "recursion_wise")

    def decode(ids) -> str:
        return "".join(chr(ord("a") + i) for i in ids)

    (free,) = serve(model, [Request(prompt(4), 12)], decode=decode)
    assert free.text == decode(free.tokens)
    (by_id,) = serve(model, [Request(prompt(4), 12, stop_ids=(free.tokens[5],))])
    assert by_id.tokens == free.tokens[: free.tokens.index(free.tokens[5]) + 1]
    assert by_id.finish_reason == "stop"
    stop = free.text[3:6]
    (by_text,) = serve(model, [Request(prompt(4), 12, stop=("#", stop))], decode=decode)
    assert by_text.text == free.text[: free.text.index(stop)]
    assert by_text.finish_reason == "stop"


def give_way(engine: DepthBatchingEngine) -> None:
    """Take a sequence out in the middle of its computation."""
    progress = engine.scheduler.last()
    assert progress is not None
    engine.runner.drop(engine._preempt(progress))


@pytest.mark.parametrize("preempts", [False, True])
def test_logprobs_are_those_of_the_full_forward_pass(preempts: bool) -> None:
    """Of prompts in chunks and of generated tokens, also for sequences that were preempted."""
    model = model_for("expert_choice", "recursion_wise")
    sampling = Sampling(1.0, repetition_penalty=1.5)  # which changes the text, not its logprobs
    requests = [
        Request(prompt(length, length), 9, sampling, num_logprobs=count, prompt_logprobs=True)
        for length, count in ((11, 3), (1, 0), (6, 1), (8, VOCAB_SIZE))
    ]
    engine = DepthBatchingEngine(
        model, CacheSettings(1 << 20, 4, max_length=64, page_size=4), chunk_size=4
    )
    numbers = [engine.submit(request) for request in requests]
    events = []
    while not engine.is_idle:
        events += engine.step()
        if preempts and engine.counters.ticks in (2, 5, 9):  # in a prompt, and in a text
            give_way(engine)
    for number, request in zip(numbers, requests, strict=True):
        own = [event for event in events if event.number == number]
        text = [*request.ids, *(event.token for event in own if event.token is not None)]
        assert len(own) == 9 and all(not event.prompt_logprobs for event in own[1:])
        logprobs = [*own[0].prompt_logprobs, *(event.logprobs for event in own)]
        assert [found.token for found in logprobs] == text[1:]
        with torch.no_grad():
            logits = model(torch.tensor([text]), causal_routing=True).logits[0]
        expected = logits.log_softmax(dim=-1).tolist()
        for found, row in zip(logprobs, expected[:-1], strict=True):
            assert found.logprob == pytest.approx(row[found.token], abs=1e-5)
            best = sorted(row, reverse=True)[: request.num_logprobs]
            assert [p for _, p in found.best] == pytest.approx(best, abs=1e-5)
            assert all(row[i] == pytest.approx(p, abs=1e-5) for i, p in found.best)


def test_a_penalty_follows_the_text_of_its_own_request_through_preemptions() -> None:
    model = model_for("expert_choice", "sharing_with_update", "middle_cycle")
    never_twice = Sampling(repetition_penalty=100.0, presence_penalty=2.0)
    requests = [Request(prompt(5, seed), 10, never_twice) for seed in range(4)]
    alone = [serve(model, [request])[0].tokens for request in requests]
    together = Recorder(model)
    for request in requests:
        together.submit(request)
    for _ in range(3):
        for _ in range(5):
            together.step()
        give_way(together.engine)
    assert [served.tokens for served in together.finish()] == alone
    free = [serve(model, [replace(request, sampling=Sampling())])[0].tokens for request in requests]
    assert alone != free


def test_a_stream_that_is_left_early_gives_its_pages_back() -> None:
    model = model_for("expert_choice", "recursion_wise")
    engine = DepthBatchingEngine(model, CacheSettings(1 << 20, 2, 64))
    events = engine.stream(Request(prompt(4), 12))
    assert next(events).token is not None
    events.close()
    engine.step()
    assert engine.is_idle and engine.caches.num_bytes_in_use == 0


@pytest.mark.parametrize("router", ALL_ROUTERS)
def test_nothing_is_assessed_while_generating(router: str, monkeypatch) -> None:
    model = model_for(router, "recursion_wise")
    request, assessed = Request(prompt(5), 3), []
    kind, assess = type(model.recursions[0].router), type(model.recursions[0].router).assess
    monkeypatch.setattr(
        kind, "assess", lambda self, *given: assessed.append(given) or assess(self, *given)
    )
    (served,) = serve(model, [request])
    assert len(served.tokens) == 3 and not assessed
    model(random_ids(1, 5))
    assert len(assessed) == 3  # once a step in a full forward pass


def test_half_precision_runs_the_other_way_of_attention() -> None:
    model = model_for("expert_choice", "sharing_with_update", "middle_cycle")
    request = Request(prompt(7), 4)
    served = serve(model.to(torch.bfloat16), [request, Request(prompt(2), 4)])[0]
    assert_exact(model, request, served, tolerance=0.15)


@pytest.mark.parametrize("eight_bits", ["is_int8", "is_fp8"])
@pytest.mark.parametrize("policy", POLICIES)
def test_8_bit_rows_change_little(policy: KVPolicy, eight_bits: str) -> None:
    model = model_for("token_choice", policy)
    request = Request(prompt(9), 3)
    exact, coarse = serve(model, [request])[0], Recorder(model, **{eight_bits: True})
    coarse.submit(request)
    first = torch.stack([exact.logits[0], coarse.finish()[0].logits[0]])
    assert 0 < (first[0] - first[1]).abs().max() < 0.1
