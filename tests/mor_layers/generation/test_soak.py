"""Many requests of all kinds through one engine: every one ends, and nothing is left over."""

import random
from dataclasses import replace

import pytest

from mor_layers import MoRTransformer
from mor_layers.generation import Request, Sampling
from mor_layers.recursion import KVPolicy
from tests.mor_layers.generation.served import Recorder, prompt, serve
from tests.mor_layers.small_models import ROUTERS, small_config, small_model


def any_request(rng: random.Random, seed: int) -> Request:
    temperature = rng.choice([0.0, 0.8])
    return Request(
        prompt(rng.choice([1, 2, 5, 11, 24]), seed),
        rng.choice([1, 3, 9, 20]),
        Sampling(temperature, rng.choice([0, 4]), rng.choice([1.0, 0.9])),
        stop_ids=(rng.randrange(17),) if rng.random() < 0.2 else (),
        timeout=rng.choice([None, None, None, 15.0]),
        client=rng.choice(["few", "many", "many", "many"]),
    )


def soak(policy: KVPolicy, count: int, seed: int = 0) -> None:
    """Requests come in bursts; some are cancelled, late, or can never be served."""
    rng = random.Random(seed)
    model = small_model(small_config(ROUTERS["expert_choice"], 3, "middle_cycle", policy))
    now = [0.0]
    # Too few pages for what is admitted, so that sequences give way.
    recorder = Recorder(
        model,
        kv_bytes=24_000,
        num_slots=5,
        chunk_size=6,
        shares=(0.5, 0.2, 0.1),
        clock=lambda: now[0],
    )
    requests: dict[int, Request] = {}
    refused = cancelled = 0
    while len(requests) + refused < count or not recorder.engine.is_idle:
        if rng.random() < 0.4 and len(requests) + refused < count:
            for _ in range(rng.randrange(1, 6)):
                request = any_request(rng, len(requests))
                if rng.random() < 0.1:
                    with pytest.raises(ValueError, match=r"max_length|vocabulary|kv_bytes|decode"):
                        recorder.submit(impossible(rng, request))
                    refused += 1
                    continue
                requests[recorder.submit(request)] = request
        if requests and rng.random() < 0.1:
            cancelled += recorder.engine.cancel(rng.choice(list(requests)))
        recorder.step()
        now[0] += 1.0
    served = recorder.finish()
    engine = recorder.engine
    assert engine.num_running == engine.num_waiting == 0
    assert engine.counters.finished == len(requests) and engine.counters.preemptions > 0
    reasons = [own.finish_reason for own in served]
    assert reasons.count("cancelled") == cancelled > 0 and refused > 0
    assert set(reasons) == {"cancelled", "timeout", "length", "stop"}
    for number, own in enumerate(served):
        request = replace(requests[number], timeout=None)
        seeded = replace(request, sampling=replace(request.sampling, seed=number))
        alone = alone_tokens(model, seeded)
        assert own.tokens == alone[: len(own.tokens)], "company changed a request"
        if own.finish_reason in ("length", "stop"):
            assert len(own.tokens) == len(alone)


def alone_tokens(model: MoRTransformer, request: Request) -> list[int]:
    """Tokens of a request that has the engine for itself."""
    recorder = Recorder(model)
    recorder.engine.submit(request)
    return [event.token for event in recorder.engine.run() if event.token is not None]


def impossible(rng: random.Random, request: Request) -> Request:
    return rng.choice(
        [
            replace(request, max_new_tokens=64),
            replace(request, ids=(*request.ids, 17)),
            replace(request, ids=(-1,)),
            replace(request, stop=("x",)),
        ]
    )


def test_a_soak_leaves_nothing_behind() -> None:
    soak("recursion_wise", 60)


@pytest.mark.full
@pytest.mark.parametrize("policy", ["recursion_wise", "exit_state"])
def test_a_soak_of_a_thousand_requests(policy: KVPolicy) -> None:
    soak(policy, 1000, seed=1)


def test_sequences_alone_are_what_batches_are_compared_with() -> None:
    model = small_model(small_config(ROUTERS["token_choice"], 3))
    requests = [Request(prompt(3, seed), 4) for seed in range(3)]
    together = [own.tokens for own in serve(model, requests)]
    assert together == [serve(model, [request])[0].tokens for request in requests]
