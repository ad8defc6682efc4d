"""Engines whose graphs choose tokens and run ahead of the host answer as an engine without graphs does.

The function runs without a compiler, see `test_static_tick`.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from mor_layers import MoRTransformer
from mor_layers.generation import (
    CacheSettings,
    DepthBatchingEngine,
    Event,
    Request,
    Sampling,
    calibrate,
)
from mor_layers.generation.sampling import sample
from mor_layers.generation.scheduling import Continuation, Span
from mor_layers.generation.tick.graph.choosing import NOT_CHOSEN, Choosing
from mor_layers.generation.tick.graph.sizes import FEWEST
from mor_layers.recursion import KVPolicy
from tests.mor_layers.generation.served import prompt
from tests.mor_layers.generation.test_engine import POLICIES
from tests.mor_layers.small_models import ROUTERS, random_ids, small_config, small_model

LETTERS = "abcdefghijklmnopq"

SOME_POLICIES = [
    "recursion_wise",
    pytest.param("recursive_sharing", marks=pytest.mark.full),
    pytest.param("sharing_with_update", marks=pytest.mark.full),
    "exit_state",
]

WAYS = {
    "in turns": {"compiler": "eager"},
    "ahead": {"compiler": "eager", "runs_ahead": True},
}


pytestmark = pytest.mark.usefixtures("uncompiled")


@dataclass
class Answer:
    """What a client learns about a request."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int | None] = field(default_factory=list)
    prompt_depths: tuple[int, ...] = ()
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    error: str = ""


class Client:
    """Sends requests, and notes the answers."""

    def __init__(self, model: MoRTransformer, **options: Any) -> None:
        cache = {"kv_bytes": 1 << 20, "num_slots": 5, "max_length": 64, "page_size": 4}
        cache |= {name: options.pop(name) for name in (*cache, "shares") if name in options}
        settings = CacheSettings(**cache)
        decode = lambda ids: "".join(LETTERS[i] for i in ids)  # noqa: E731
        self.engine = DepthBatchingEngine(model, settings, decode=decode, **options)
        self.answers: dict[int, Answer] = {}
        self.num_ahead = 0

    def submit(self, request: Request) -> int:
        number = self.engine.submit(request)
        self.answers[number] = Answer()
        return number

    def step(self) -> None:
        events = self.engine.step()
        self.num_ahead += self.engine.runner.num_started
        assert len({e.number for e in events if e.token is not None}) == sum(
            e.token is not None for e in events
        )
        for event in events:
            self._note(event)

    def _note(self, event: Event) -> None:
        own = self.answers[event.number]
        assert own.finish_reason is None, "an event of a request that has ended"
        own.text, own.finish_reason, own.error = (
            own.text + event.text,
            event.finish_reason,
            event.error,
        )
        if event.token is not None:
            own.tokens.append(event.token)
            own.depths.append(event.depth)
            own.prompt_depths += event.prompt_depths
            if event.logprobs is not None:
                own.logprobs.append((event.logprobs.token, event.logprobs.best[0][0]))

    def finish(self) -> list[Answer]:
        for _ in range(5000):
            if self.engine.is_idle:
                break
            self.step()
        engine = self.engine
        assert engine.is_idle, "requests that never end"
        assert engine.num_running == engine.num_waiting == 0
        assert engine.caches.pages_free == engine.caches.pages, "pages are lost"
        assert engine.prefixes.pages_borrowed == [0, 0]
        assert engine.counters.finished == len(self.answers)
        assert engine.counters.generated_tokens == sum(len(a.tokens) for a in self.answers.values())
        return list(self.answers.values())


def answers(client: Client, requests: Sequence[Request]) -> list[Answer]:
    """Requests come one tick after another."""
    for request in requests:
        client.submit(request)
        client.step()
    return client.finish()


def of_all_kinds(count: int, seed: int) -> list[Request]:
    """Requests that a graph can go on with, in all ways of choosing."""
    rng = random.Random(seed)
    return [
        Request(
            prompt(rng.choice([1, 2, 5, 11]), seed + number),
            rng.choice([1, 2, 5, 12, 20]),
            Sampling(
                rng.choice([0.0, 0.7, 1.5]),
                rng.choice([0, 0, 4]),
                rng.choice([1.0, 0.8]),
                rng.choice([0.0, 0.05]),
                seed=rng.choice([number, -number, 1 << 63, 3**99]),
            ),
            stop_ids=tuple(rng.sample(range(17), rng.choice([0, 0, 1, 3]))),
            stop=rng.choice([(), (), ("q", "ab"), (LETTERS[seed % 17] + "c",)]),
        )
        for number in range(count)
    ]


def needing_the_host(seed: int) -> list[Request]:
    """Requests that a graph cannot go on with."""
    ids = prompt(3, seed)
    return [
        Request(ids, 9, Sampling(0.9, repetition_penalty=1.3, seed=5)),
        Request(ids, 9, Sampling(logit_bias=((3, 4.0),))),
        Request(ids, 9, num_logprobs=1),
        Request(ids, 9, Sampling(1.0, seed=8), stop_ids=tuple(range(9))),
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", POLICIES)
def test_answers_are_the_same(policy: KVPolicy, way: str) -> None:
    model = small_model(small_config(ROUTERS["expert_choice"], 3, kv_policy=policy))
    requests = of_all_kinds(12, POLICIES.index(policy))
    client = Client(model, chunk_size=3, **WAYS[way])
    assert answers(client, requests) == answers(Client(model, chunk_size=3), requests)
    assert (client.num_ahead > 10) == (way == "ahead")


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("policy", SOME_POLICIES)
def test_what_a_gpu_records_gives_the_same(policy: KVPolicy) -> None:
    model = small_model(small_config(ROUTERS["token_choice"], 3, kv_policy=policy))
    requests = of_all_kinds(12, 20 + POLICIES.index(policy))
    client = Client(model, num_slots=9, chunk_size=3, **WAYS["ahead"])
    assert answers(client, requests) == answers(Client(model, chunk_size=3), requests)
    assert client.num_ahead > 10


@pytest.mark.parametrize("way", WAYS)
def test_requests_that_need_the_host_run_among_others(way: str) -> None:
    model = small_model(small_config(ROUTERS["expert_choice"]))
    for order in (1, -1):
        requests = (of_all_kinds(6, 40) + needing_the_host(41))[::order]
        client, plain = Client(model, **WAYS[way]), Client(model)
        assert answers(client, requests) == answers(plain, requests)


@pytest.mark.parametrize(
    ("policy", "way"),
    [
        ("recursion_wise", "in turns"),
        ("exit_state", "ahead"),
        *(
            pytest.param(policy, way, marks=pytest.mark.full)
            for policy, way in itertools.product(POLICIES, WAYS)
            if (policy, way) not in {("recursion_wise", "in turns"), ("exit_state", "ahead")}
        ),
    ],
)
def test_sequences_that_gave_way_get_the_same_answers(policy: KVPolicy, way: str) -> None:
    model = small_model(small_config(ROUTERS["expert_choice"], 3, "middle_cycle", policy))
    calibrate(model, [random_ids(8, 32)])
    requests = [
        Request(prompt(4, seed), 20, Sampling(0.8 * (seed % 2), seed=seed)) for seed in range(6)
    ]
    tight = {"kv_bytes": 24_000, "num_slots": 6, "shares": (0.3, 0.02, 0.02)}
    client = Client(model, **tight, **WAYS[way])
    assert answers(client, requests) == answers(Client(model, **tight), requests)
    assert client.engine.counters.preemptions > 0


@pytest.mark.parametrize("policy", SOME_POLICIES)
def test_cancelled_requests_leave_no_trace(policy: KVPolicy) -> None:
    """They end while a tick computes their next tokens."""
    model = small_model(small_config(ROUTERS["token_choice"], 3, kv_policy=policy))
    system = prompt(9, 60)
    requests = [
        replace(own, ids=(*system, *own.ids), client="ab"[i % 2], priority=-i)
        for i, own in enumerate(of_all_kinds(14, 50))
    ]
    wanted = answers(Client(model), requests)
    client, rng = Client(model, **WAYS["ahead"]), random.Random(0)
    for request in requests:
        client.submit(request)
        client.step()
        if rng.random() < 0.5:
            client.engine.cancel(rng.choice(list(client.answers)))
        if rng.random() < 0.3:
            client.engine.prefixes.clear()
    got = client.finish()
    assert 0 < sum(own.finish_reason == "cancelled" for own in got) < len(got)
    for own, other in zip(got, wanted, strict=True):
        if own.finish_reason == "cancelled":
            count = len(own.tokens)
            assert (own.tokens, own.depths) == (other.tokens[:count], other.depths[:count])
        else:
            assert own == other


@pytest.mark.parametrize("way", WAYS)
def test_a_request_whose_logits_are_not_finite_ends_alone(way: str) -> None:
    model = small_model(small_config(ROUTERS["expert_choice"]))
    with torch.no_grad():
        model.embedding.weight[3] = torch.nan
    broken = Request((2, 3), 8), Request((3,), 8), Request((3,), 8, Sampling(0.9, top_k=2))
    requests = [Request((1, 2), 8), *broken, Request((1,), 8, Sampling(1.0))]
    client = Client(model, **WAYS[way])
    got = answers(client, requests)
    assert got == answers(Client(model), requests)
    assert all("not finite" in own.error for own in got[1:4])


def test_a_graph_does_not_choose_within_limits_that_few_candidates_cannot_decide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mor_layers.generation.sampling.draws.NUM_CANDIDATES", 3)
    model = small_model(small_config(ROUTERS["expert_choice"]))
    settings = Sampling(1.5, top_p=0.9), Sampling(1.5, top_k=2), Sampling(1.5, top_k=9)
    requests = [Request(prompt(3, i), 12, own) for i, own in enumerate(settings)]
    for way in WAYS.values():
        assert answers(Client(model, **way), requests) == answers(Client(model), requests)


def test_a_sequence_follows_until_it_ends() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 17)
    best = logits.argmax(dim=-1).tolist()
    settings = [Sampling(), Sampling(), Sampling(), Sampling(0.7, seed=1), Sampling(0.9, 3, seed=2)]
    ends = [((16, best[0]), 9), ((), 4), ((), 5), ((), 9), ((), 9)]
    spans = [
        Span(slot, 5, [1], True, continuation=Continuation(own, 3, most, stop))
        for slot, (own, (stop, most)) in enumerate(zip(settings, ends, strict=True))
    ]
    choosing = Choosing(7, 17, torch.device("cpu"))
    choosing.note([*spans, Span(5, 5, [1], True)])
    slots = torch.tensor([3, 0, 6, 4, 1, 2, 5])
    rows = logits[slots.clamp(max=5)]
    ways = torch.empty(*(FEWEST + count for count in choosing.counts), 0)
    chosen = choosing(rows, slots, torch.full((7,), 5), ways)
    wanted = sample(logits[:5], settings, [3] * 5).tolist()
    tokens = [NOT_CHOSEN if slot > 4 else wanted[slot] for slot in slots.tolist()]
    assert chosen.tokens.tolist() == tokens
    entering = {slot: (i, at, place) for i, slot, at, place in chosen.following.T.tolist()}
    del entering[6]
    assert entering == {slot: (wanted[slot], 6, 0) for slot in (2, 3, 4)}
    assert choosing.num_generated.tolist() == [4, 4, 4, 4, 4, 0, 0]


def test_the_host_may_limit_what_enters_a_tick() -> None:
    model = small_model(small_config(ROUTERS["expert_choice"]))
    requests = of_all_kinds(8, 70)
    for way in WAYS.values():
        client = Client(model, tokens_per_tick=2, **way)
        assert answers(client, requests) == answers(Client(model), requests)


def test_ticks_that_are_no_graphs_cannot_run_ahead() -> None:
    with pytest.raises(ValueError, match="Pass a compiler"):
        Client(small_model(small_config()), runs_ahead=True)
