"""The server, called as its users call it."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mor_layers.generation import DepthBatchingEngine, Request, scheduling
from mor_tools.commands import generate, main, serve
from mor_tools.serving import loading
from mor_tools.serving.access import Access
from mor_tools.serving.app import Limits
from mor_tools.serving.calls import completions
from mor_tools.serving.calls.protocol import UNSUPPORTED
from mor_tools.serving.engines.worker import EngineWorker, UnavailableError
from tests.mor_tools.serving.running import (
    SIZES,
    Running,
    engine_of,
    options_of,
    running,
    wait_until,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as own:
        yield own


def test_a_completion_is_what_the_engine_says(server: Running) -> None:
    answer = server.client.completions.create(
        model="random", prompt="Hello", max_tokens=12, temperature=0
    )
    (choice,) = answer.choices
    assert choice.text == server.alone("Hello", 12)
    assert choice.finish_reason == "length" and answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == 5 and len(choice.depths) == 12


def test_a_stream_says_the_same_piece_by_piece(server: Running) -> None:
    arguments = {"model": "random", "prompt": "Hello", "max_tokens": 12, "temperature": 0.8}
    arguments |= {"seed": 7, "top_p": 0.9, "extra_body": {"top_k": 40}}
    whole = server.client.completions.create(**arguments)
    chunks = list(
        server.client.completions.create(
            **arguments, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices
    assert len(chunks) == 13
    text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
    assert text == whole.choices[0].text
    assert text == server.alone("Hello", 12, temperature=0.8, top_p=0.9, top_k=40, seed=7)
    assert chunks[-2].choices[0].finish_reason == "length"


def test_prompts_and_choices_of_one_call(server: Running) -> None:
    answer = server.client.completions.create(
        model="random", prompt=["ab", "cde"], n=2, max_tokens=6, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[3].text == server.alone("cde", 6, temperature=1.0, seed=2)
    by_ids = server.client.completions.create(model="random", prompt=[97, 98], max_tokens=6, seed=1)
    assert by_ids.choices[0].text == answer.choices[0].text
    chunks = server.client.completions.create(
        model="random", prompt="ab", n=2, max_tokens=6, seed=1, stream=True
    )
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices[:2]]


def test_stop_strings_end_a_text(server: Running) -> None:
    free = server.alone("Hello", 30)
    stop = free[5:7]
    answer = server.client.completions.create(
        model="random", prompt="Hello", max_tokens=30, temperature=0, stop=[stop]
    )
    assert answer.choices[0].text == free[: free.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_penalties_bias_and_limits_are_those_of_the_engine(server: Running) -> None:
    given = {"presence_penalty": 1.5, "frequency_penalty": -0.5, "temperature": 0.9, "seed": 3}
    beyond = {"min_p": 0.05, "repetition_penalty": 1.3}
    answer = server.client.completions.create(
        model="random",
        prompt="Hello",
        max_tokens=12,
        logit_bias={"101": 4.5},
        extra_body=beyond | {"priority": -1},
        **given,
    )
    assert answer.choices[0].text == server.alone(
        "Hello", 12, logit_bias=((101, 4.5),), **given, **beyond
    )


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_with_the_prompt(server: Running, stream: bool) -> None:
    arguments = {"model": "random", "prompt": "Hello", "max_tokens": 3, "temperature": 0}
    arguments |= {"logprobs": 2, "stream": stream}
    text = server.alone("Hello", 3)
    with torch.no_grad():
        ids = torch.tensor([[*b"Hello", *text.encode()]])
        model = server.service.model.model
        expected = model(ids, causal_routing=True).logits[0, :-1].log_softmax(dim=-1)
    for echo in (True, False):
        answer = server.client.completions.create(**arguments, echo=echo)
        parts = [part.choices[0] for part in (answer if stream else [answer])]
        whole = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        for part in parts:
            for name, entries in whole.items():
                entries += getattr(part.logprobs, name)
        begin = 0 if echo else 5
        assert "".join(part.text for part in parts) == ("Hello" + text)[begin:]
        assert whole["tokens"] == list(("Hello" + text)[begin:])
        assert whole["text_offset"] == list(range(8 - begin))
        if echo:
            assert whole["token_logprobs"].pop(0) is whole["top_logprobs"].pop(0) is None
        own = expected[max(begin - 1, 0) :]
        tokens = ids[0, max(begin, 1) :]
        assert whole["token_logprobs"] == pytest.approx(
            own.gather(1, tokens[:, None])[:, 0].tolist(), abs=1e-5
        )
        for found, row in zip(whole["top_logprobs"], own, strict=True):
            # Bytes that are no character look alike, so that the protocol can report one of them.
            assert 1 <= len(found) <= 2
            best = row.topk(2).values.tolist()
            assert all(any(p == pytest.approx(b, abs=1e-5) for b in best) for p in found.values())


def test_many_callers_at_once_get_what_each_gets_alone(server: Running) -> None:
    def call(seed: int) -> str:
        answer = server.client.completions.create(
            model="random", prompt="x" * (1 + seed % 7), max_tokens=8, seed=seed
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(8) as callers:
        texts = list(callers.map(call, range(16)))
    expected = [
        server.alone("x" * (1 + seed % 7), 8, temperature=1.0, seed=seed) for seed in range(16)
    ]
    assert texts == expected
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "ids is empty"),
        ({"prompt": [1, 999]}, "vocabulary"),
        ({"prompt": "x" * 200}, "exceed max_length"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 101}, "1..100"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 40}, "choices in total"),
        ({"logprobs": 21}, "logprobs=21 must be in 0..20"),
        ({"suffix": "y"}, "not supported"),
        ({"logit_bias": {"x": 1}}, "token ids"),
        ({"logit_bias": {"3": 101}}, "numbers in -100..100"),
        ({"logit_bias": {"999": 1}}, "outside of 0..255"),
        ({"presence_penalty": 3}, "must be in -2..2"),
        ({"extra_body": {"min_p": 2}}, "min_p"),
        ({"extra_body": {"priority": 1 << 63}}, "priority"),
        ({"stop": ["a"] * 5}, "up to 4"),
        ({"n": 2, "best_of": 3}, "best_of must be n"),
        ({"extra_body": {"stop_token_ids": [256]}}, "token ids in 0..255"),
        ({"extra_body": {"stop_token_ids": [True]}}, "token ids in 0..255"),
        ({"extra_body": {"stop_token_ids": [1] * 200}}, "up to 128"),
        ({"extra_body": {"min_tokens": 3}}, "min_tokens=3 is not supported"),
        ({"extra_body": {"use_beam_search": True}}, "use_beam_search=True is not supported"),
        ({"extra_body": {"top_k": -2}}, "top_k"),
        ({"extra_body": {"depth": 3}}, "unknown parameter 'depth'"),
        ({"extra_body": {"max_tokens": "many"}}, "expected int"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_impossible_calls_are_refused_with_a_reason(server, arguments, message, stream) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        server.client.completions.create(
            **{"model": "random", "prompt": "x", "stream": stream} | arguments
        )


NEUTRAL = {
    name: value
    for name, allowed in (UNSUPPORTED | completions.UNSUPPORTED).items()
    for value in allowed
}
"""Of each field that is not supported, a value that has no effect."""


def test_fields_of_other_servers_are_taken_where_they_have_no_effect(server: Running) -> None:
    others = {"user": "me", "metadata": {"a": "b"}, "request_id": "x", "top_k": -1, "best_of": 1}
    others |= {"safety_identifier": "y", "prompt_cache_key": "z", "stop_token_ids": []}
    body = {"prompt": "Hello", "max_tokens": 4, "temperature": 0} | NEUTRAL | others
    answer = server.post(body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == server.alone("Hello", 4)


def test_tokens_of_the_body_end_its_text(server: Running) -> None:
    free = server.alone("Hello", 30)
    end = next(character for character in free[3:] if character.isascii())
    answer = server.post(
        {"prompt": "Hello", "max_tokens": 30, "temperature": 0, "stop_token_ids": [ord(end)]}
    ).json()
    assert answer["choices"][0]["text"] == free[: free.index(end)]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_stream_tells_the_usage_so_far(server: Running) -> None:
    arguments = {"model": "random", "prompt": "Hello", "max_tokens": 4, "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(server.client.completions.create(**arguments, stream_options=options))
    assert [chunk.usage.completion_tokens for chunk in chunks] == [1, 2, 3, 4, 4]
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {5}
    for options in ({}, {"include_usage": False, "continuous_usage_stats": True}):
        chunks = list(server.client.completions.create(**arguments, stream_options=options))
        assert len(chunks) == 4 and all(chunk.usage is None for chunk in chunks)


def test_models_and_paths_that_are_not_served(server: Running) -> None:
    model = server.client.models.retrieve("random")
    assert model.id == "random" and model.max_model_len == 128
    assert abs(model.created - time.time()) < 3600
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        server.client.models.retrieve("other")
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError, match="'other' is not served"):
            server.client.completions.create(model="other", prompt="x", stream=stream)
    for method, path, status in (
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/" + "x" * 500, 404),
    ):
        answer = httpx.request(method, server.url + path)
        message = answer.json()["error"]["message"]
        assert answer.status_code == status and "is not served" in message and len(message) < 200


def test_bodies_that_are_no_calls(server: Running) -> None:
    for body, status in ((b"{", 400), (b"[]", 400), (b"\xff", 400), (b" " * (1 << 21), 413)):
        answer = server.post(body)
        assert answer.status_code == status and answer.json()["error"]["message"]
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405


@pytest.mark.parametrize(
    "numbers",
    [
        {"temperature": 1e-40},
        {"temperature": 5e-324, "top_k": 3},
        {"temperature": 1e308, "top_p": 1e-300},
        {"top_k": 1 << 63},
        {"top_k": int("9" * 400), "top_p": 0.5},
        {"seed": -(1 << 63)},
    ],
    ids=lambda numbers: "-".join(numbers),
)
def test_any_admissible_numbers_are_served(server: Running, numbers) -> None:
    answer = server.post({"prompt": "Hello", "max_tokens": 4} | numbers)
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "length" and len(choice["depths"]) == 4
    assert httpx.get(f"{server.url}/health").text == "ok"
    if numbers.get("temperature", 1.0) < 1e-30:
        assert choice["text"] == server.alone("Hello", 4)


LARGE = "9" * 400
ODD_BODIES = {
    "deep nesting": ("[" * 100_000, "nested too deeply"),
    "deep prompt": ('{"prompt": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
    "deep stop": ('{"prompt": "x", "stop": ' + "[" * 800 + "]" * 800 + "}", "stop must be"),
    "deep echo": ('{"prompt": "x", "echo": ' + "[" * 800 + "]" * 800 + "}", "echo"),
    "large temperature": (f'{{"prompt": "x", "temperature": {LARGE}}}', "temperature.*too large"),
    "large top_p": (f'{{"prompt": "x", "top_p": {LARGE}}}', "top_p.*too large"),
    "large timeout": (f'{{"prompt": "x", "timeout": {LARGE}}}', "timeout.*too large"),
    "large seed": (f'{{"prompt": "x", "seed": {LARGE}}}', "must be in -9223372036854775808.."),
    "large n": (f'{{"prompt": "x", "n": {LARGE}}}', "choices in total"),
    "large max_tokens": (f'{{"prompt": "x", "max_tokens": {LARGE}}}', "must be in"),
    "large id": (f'{{"prompt": [{LARGE}]}}', "vocabulary"),
    "infinite temperature": ('{"prompt": "x", "temperature": 1e999}', "finite"),
    "longest number": (f'{{"prompt": "x", "top_k": {"9" * 5000}}}', "not valid JSON"),
    "NaN": ('{"prompt": "x", "temperature": NaN}', "NaN is not a number in JSON"),
    "lone surrogate in prompt": (r'{"prompt": "\ud800"}', "not valid Unicode"),
    "lone surrogate in model": (r'{"prompt": "x", "model": "\udfff"}', "not valid Unicode"),
    "lone surrogate in name": (r'{"prompt": "x", "\ud800": 1}', "not valid Unicode"),
    "lone surrogate in stop": (r'{"prompt": "x", "stop": "\udc00"}', "not valid Unicode"),
    "UTF-16": ('{"prompt": "x"}'.encode("utf-16"), "not valid Unicode"),
    "no prompt": ("{}", "prompt must be"),
    "mixed prompts": ('{"prompt": ["x", 1]}', "prompt must be"),
    "nothing": ("", "not valid JSON"),
    "stream_options": ('{"prompt": "x", "stream_options": 5}', "expected dict"),
    "unused options": (
        '{"prompt": "x", "stream_options": {"include_usage": true}}',
        "requires stream=true",
    ),
}


@pytest.mark.parametrize(("body", "reason"), ODD_BODIES.values(), ids=ODD_BODIES)
def test_odd_bodies_are_refused_with_a_reason(server: Running, body, reason) -> None:
    answer = server.post(body if isinstance(body, bytes) else body.encode())
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and re.search(reason, message) and len(message) < 400


def test_a_large_body_is_refused_before_it_is_read(server: Running) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {1 << 30}\r\n\r\n"
    with socket.create_connection(server.socket.getsockname(), timeout=5) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1 << 12).startswith(b"HTTP/1.1 413")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server that waits for a request for a moment, and has three connections at most."""
    monkeypatch.setattr(serve, "Limits", partial(Limits, body_timeout=0.5, max_connections=3))
    with running() as own:
        yield own


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: loc"])
def test_a_connection_that_sends_no_request_is_closed(impatient: Running, sent: bytes) -> None:
    with socket.create_connection(impatient.socket.getsockname(), timeout=10) as connection:
        connection.sendall(sent)
        assert impatient.post({"prompt": "x", "max_tokens": 1}).status_code == 200
        assert connection.recv(1 << 12) == b""


def test_a_connection_that_has_sent_a_request_stays_open(impatient: Running) -> None:
    with httpx.Client(base_url=impatient.url) as client:
        assert client.get("/health").text == "ok"
        kept = set(impatient.server.server_state.connections)
        time.sleep(0.7)
        assert client.get("/health").text == "ok"
        assert impatient.server.server_state.connections == kept and len(kept) == 1


def test_connections_beyond_the_limit_are_closed(impatient: Running) -> None:
    address = impatient.socket.getsockname()
    with ExitStack() as places:
        for _ in range(3):
            places.enter_context(socket.create_connection(address))
        wait_until(lambda: len(impatient.server.server_state.connections) == 3)
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            httpx.get(f"{impatient.url}/health")
    wait_until(lambda: not impatient.server.server_state.connections)
    assert httpx.get(f"{impatient.url}/health").text == "ok"


def test_web_pages_cannot_post(server: Running) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    # What a page may send without asking the server first, and what is no JSON in UTF-8.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = server.post(body, content_type=kind)
        assert answer.status_code == 415 and "Content-Type" in answer.json()["error"]["message"]
    assert server.post(body, content_type="application/json; charset=utf-16").status_code == 415
    assert server.post(body, content_encoding="gzip").status_code == 415
    assert server.post(body, content_type="Application/JSON; charset=UTF-8").status_code == 200
    asked = httpx.options(f"{server.url}/v1/completions", headers={"origin": "http://a.example"})
    assert "access-control-allow-origin" not in asked.headers


def test_the_server_answers_to_its_own_name_only(server: Running) -> None:
    for path in ("/v1/models", "/health", "/metrics"):
        answer = httpx.get(server.url + path, headers={"host": "rebound.example:8000"})
        assert answer.status_code == 403 and "--allowed-host" in answer.text
    assert httpx.get(f"{server.url}/health", headers={"host": "LOCALHOST.:99"}).text == "ok"


@pytest.mark.parametrize(
    ("bound", "allowed", "refused"),
    [
        ("127.0.0.1", ["127.0.0.1:8000", "localhost", "[::1]:80"], ["10.0.0.1", "evil.example"]),
        ("::1", ["[::1]", "localhost:1"], ["[::2]", "[::1", "::1", "[::1]evil.example"]),
        ("10.0.0.1", ["10.0.0.1:80", "models.example"], ["localhost", "10.0.0.2", ""]),
        ("0.0.0.0", ["10.0.0.1:80", "[fe80::1]", "localhost"], ["evil.example", "10.0.0.1.x"]),
        ("box.example", ["box.example", "BOX.example.:80"], ["localhost", "a.box.example"]),
    ],
)
def test_hosts_that_a_server_is_known_by(bound, allowed, refused) -> None:
    access = Access.bound_to(bound, ["models.example"])
    assert all(access.allows_host(host) for host in (*allowed, "models.example:443"))
    assert not any(access.allows_host(host) for host in refused)


def test_callers_send_one_of_the_api_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("second\n\n  schlüssel \n")
    with running("--api-key", "first", "--api-key-file", str(file)) as own:
        body = {"prompt": "x", "max_tokens": 1}
        for key in ("first", "second"):
            assert own.post(body, authorization=f"Bearer {key}").status_code == 200
        for header in ("Bearer third", "Bearer", "Bearer firs", "Basic first", "first"):
            answer = own.post(body, authorization=header)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert own.post(body).status_code == 401
        assert httpx.get(f"{own.url}/metrics").status_code == 401
        assert httpx.get(f"{own.url}/health").text == "ok"
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            own.client.models.list()
        access = own.service.access
        assert access.key_number("bearer schlüssel") == 2


def test_logits_that_are_not_finite_end_one_call() -> None:
    with running() as own:
        # Bytes of the prompt that break the model: no text generated below has any.
        own.engine.runner.model.embedding.register_forward_hook(
            lambda _, given, out: out.masked_fill((given[0] == 1)[..., None], torch.nan)
        )
        arguments = {"model": "random", "prompt": "Hello", "max_tokens": 20, "temperature": 0}
        stream = own.client.completions.create(**arguments, stream=True)
        chunks = [next(iter(stream))]
        answer = own.post({"prompt": [1, 2], "max_tokens": 4})
        assert answer.status_code == 500 and "not finite" in answer.json()["error"]["message"]
        chunks += list(stream)
        assert "".join(c.choices[0].text for c in chunks) == own.alone("Hello", 20)
        assert httpx.get(f"{own.url}/health").text == "ok"
        own.wait_until_idle()


def test_a_long_prompt_holds_nobody_up(server: Running, monkeypatch) -> None:
    is_parsing, may_end = threading.Event(), threading.Event()
    encode = server.service.model.tokenizer.encode

    def slow_encode(text: str) -> list[int]:
        if text == "long":
            is_parsing.set()
            assert may_end.wait(20)
        return encode(text)

    monkeypatch.setattr(server.service.model.tokenizer, "encode", slow_encode)
    with ThreadPoolExecutor(1) as callers:
        long = callers.submit(server.post, {"prompt": "long", "max_tokens": 1})
        assert is_parsing.wait(10)
        try:
            assert httpx.get(f"{server.url}/health", timeout=5).text == "ok"
            assert server.post({"prompt": "x", "max_tokens": 1}).status_code == 200
        finally:
            may_end.set()
        assert long.result().status_code == 200


def test_a_client_may_have_so_many_requests_open() -> None:
    with running("--max-per-client", "3", "--api-key", "one", "--api-key", "two") as own:
        own.slow_down()
        arguments = {"model": "random", "prompt": "x", "max_tokens": 100, "stream": True}
        one, two = (own.client.with_options(api_key=key) for key in ("one", "two"))
        stream = one.completions.create(**arguments, n=2)
        with pytest.raises(openai.RateLimitError, match="4 open requests, but 3"):
            one.completions.create(**arguments | {"n": 2})
        two.completions.create(**arguments, n=3).close()
        stream.close()
        own.wait_until_idle()
        one.completions.create(**arguments | {"max_tokens": 1}, n=3).close()


def test_a_client_with_many_streams_does_not_hold_up_another(monkeypatch) -> None:
    monkeypatch.setattr(scheduling, "PATIENCE", 0.05)
    with running("--api-key", "many", "--api-key", "one") as own:
        own.slow_down(0.002)
        arguments = {"model": "random", "prompt": "x", "max_tokens": 100, "stream": True}
        many, one = (own.client.with_options(api_key=key) for key in ("many", "one"))
        unread = [many.completions.create(**arguments, n=2) for _ in range(2)]
        assert own.engine.num_running == 4
        answer = one.completions.create(model="random", prompt="y", max_tokens=2)
        assert answer.usage.completion_tokens == 2
        assert own.engine.counters.finished == own.engine.counters.preemptions == 1
        for stream in unread:
            stream.close()
        own.wait_until_idle()


def test_many_unread_streams_do_not_hold_up_a_short_call_of_the_same_client(monkeypatch) -> None:
    monkeypatch.setattr(scheduling, "PATIENCE", 0.05)
    monkeypatch.setattr(scheduling, "TURN", 8)
    with running() as own:
        own.slow_down(0.002)
        arguments = {"model": "random", "prompt": "x", "max_tokens": 100, "stream": True}
        unread = [own.client.completions.create(**arguments, n=2) for _ in range(4)]
        assert own.engine.num_running == own.engine.num_waiting == 4
        answer = own.client.completions.create(model="random", prompt="y", max_tokens=2)
        assert answer.usage.completion_tokens == 2
        # Those that were sent before and have not been served yet get their turn before it, too.
        assert own.engine.counters.finished == 1 and own.engine.counters.preemptions >= 5
        for stream in unread:
            stream.close()
        own.wait_until_idle()


def test_a_stream_that_nobody_reads_ends(server: Running, monkeypatch) -> None:
    """As the server's protocol sees it, whose buffers would hold much more than a short text."""
    before = server.engine.counters.finished
    monkeypatch.setattr(server.service, "limits", Limits(read_timeout=0.1))

    async def call() -> None:
        body = json.dumps({"prompt": "x", "max_tokens": 100, "stream": True}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return messages.pop() if messages else await asyncio.Event().wait()  # type: ignore

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()  # a connection that takes nothing any more

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        scope |= {"query_string": b"", "client": ("127.0.0.9", 1), "asgi": {"spec_version": "2.3"}}
        await asyncio.wait_for(server.service.app()(scope, receive, send), 10)  # type: ignore

    asyncio.run(call())
    server.wait_until_idle()
    assert server.engine.counters.finished == before + 1 and not server.service._open


def test_a_call_that_takes_too_long_ends(server: Running) -> None:
    arguments = {"model": "random", "prompt": "x", "max_tokens": 100}
    with pytest.raises(openai.InternalServerError, match="time limit"):
        server.client.completions.create(**arguments, extra_body={"timeout": 1e-3})
    server.wait_until_idle()


def test_a_caller_who_leaves_is_not_served_on(server: Running) -> None:
    before = server.engine.counters.generated_tokens
    stream = server.client.completions.create(
        model="random", prompt="x", max_tokens=100, stream=True
    )
    next(iter(stream))
    stream.close()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/completions",
            json={"prompt": "y", "max_tokens": 100},
            timeout=httpx.Timeout(5, read=0.02),
        )
    server.wait_until_idle()
    assert server.engine.counters.generated_tokens - before < 200


def test_names_health_and_metrics(server: Running) -> None:
    assert [model.id for model in server.client.models.list()] == ["random"]
    assert httpx.get(f"{server.url}/health").text == "ok"
    server.client.completions.create(model="random", prompt="x", max_tokens=3)
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert int(values["mor_generated_tokens_total"]) >= 3
    assert int(values["mor_recursion_steps_total"]) >= int(values["mor_generated_tokens_total"])
    assert int(values["mor_kv_bytes_in_use"]) == 0 < int(values["mor_kv_bytes"]) <= 1 << 20
    assert int(values['mor_answers_total{status="200"}']) > 0


def test_usage_and_metrics_tell_how_much_of_prompts_was_cached() -> None:
    text = "x" * 50
    with running("--slots", "1") as own:

        def cached(prompt: str, **extra: object) -> int:
            answer = own.client.completions.create(
                model="random", prompt=prompt, max_tokens=2, n=2, extra_body=extra
            )
            return answer.usage.prompt_tokens_details.cached_tokens or 0

        assert cached(text) == 48  # of the second choice
        assert cached(text + "y") == 2 * 48
        assert cached(text, cache_salt="other") == 48
        (*_, last) = own.client.completions.create(
            model="random",
            prompt=text,
            max_tokens=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        assert last.usage.prompt_tokens_details.cached_tokens == 48
        lines = httpx.get(f"{own.url}/metrics").text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert values["mor_cached_prompt_tokens_total"] == str(5 * 48)
        assert int(values["mor_prompt_tokens_total"]) == 7 * 50 + 2 - 5 * 48
        assert int(values["mor_kv_bytes_idle"]) > 0
    with running("--prefix-sharing", "off") as own:
        for _ in range(2):
            answer = own.client.completions.create(model="random", prompt=text, max_tokens=2)
            assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_too_many_calls_are_turned_away() -> None:
    refused = pytest.raises(openai.RateLimitError, match="Try again later")
    with running("--max-waiting", "0") as own, refused:
        own.client.completions.create(model="random", prompt="x")


def test_a_full_queue_costs_nobody_who_is_in_it() -> None:
    with running("--slots", "2", "--max-waiting", "1") as own, ThreadPoolExecutor(3) as callers:
        own.slow_down(0.002)
        arguments = {"max_tokens": 40, "temperature": 0}
        calls = []
        for number in range(3):  # two run and one waits
            calls.append(callers.submit(own.post, arguments | {"prompt": "x" * (1 + number)}))
            wait_until(lambda: own.engine.num_running + own.engine.num_waiting == len(calls))
        for _ in range(3):
            refused = own.post(arguments | {"prompt": "y"})
            assert refused.status_code == 429 and "Try again later" in refused.text
        for number, call in enumerate(calls):
            (choice,) = call.result().json()["choices"]
            assert choice["text"] == own.alone("x" * (1 + number), 40)
        assert own.engine.counters.finished == 3


def wait_until_refusing(own: Running) -> None:
    """Tell a server to stop, and wait until it takes no more calls."""
    own.server.should_exit = True
    wait_until(lambda: not own.service.worker.is_alive)


def test_shutdown_lets_calls_end_and_takes_no_new_ones() -> None:
    with running() as own:
        own.slow_down(0.005)
        stream = own.client.completions.create(
            model="random", prompt="x", max_tokens=60, temperature=0, stream=True
        )
        chunks = [next(iter(stream))]
        wait_until_refusing(own)
        with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
            own.client.completions.create(model="random", prompt="x")
        assert refused.value.status_code == 503
        assert httpx.get(f"{own.url}/health").status_code == 503
        chunks += list(stream)
        assert len(chunks) == 60 and chunks[-1].choices[0].finish_reason == "length"
    assert own.engine.is_idle and own.engine.caches.num_bytes_in_use == 0


def test_shutdown_under_load_answers_or_refuses_every_call() -> None:
    """Callers who call again and again get whole answers, and in the end a refusal."""
    with running() as own, ThreadPoolExecutor(6) as callers:
        own.slow_down(0.002)
        expected = [own.alone("x" * (1 + number), 8) for number in range(6)]
        body = {"max_tokens": 8, "temperature": 0}

        def call_until_refused(number: int) -> int:
            arguments = body | {"prompt": "x" * (1 + number), "stream": number % 2 == 0}
            for answered in range(1000):
                answer = own.post(arguments)
                if answer.status_code == 503:
                    assert "shutting down" in answer.json()["error"]["message"]
                    return answered
                assert answer.status_code == 200
                parts = [answer.text]
                if arguments["stream"]:
                    *parts, end, rest = answer.text.split("\n\n")
                    assert (end, rest) == ("data: [DONE]", "")
                parts = [json.loads(part.removeprefix("data: "))["choices"][0] for part in parts]
                assert "".join(part["text"] for part in parts) == expected[number]
                if not own.service.worker.is_alive:  # the port may be closed by now
                    return answered + 1
            raise AssertionError("was never refused")

        calls = [callers.submit(call_until_refused, number) for number in range(6)]
        wait_until(lambda: own.engine.counters.finished >= 8)
        wait_until_refusing(own)
        answered = [call.result() for call in calls]
    # Callers who wait for a slot when the signal comes are served, too.
    assert sum(answered) == own.engine.counters.finished > 8
    assert own.engine.is_idle and own.engine.caches.num_bytes_in_use == 0


def test_calls_that_outlast_the_grace_end_with_an_error() -> None:
    with running("--grace", "0") as own, ThreadPoolExecutor(6) as callers:
        own.slow_down(0.05)
        arguments = {"model": "random", "prompt": "x", "max_tokens": 100}
        # Four run and two wait.
        whole = [callers.submit(own.post, arguments) for _ in range(5)]
        stream = own.client.completions.create(**arguments | {"max_tokens": 99}, n=1, stream=True)
        wait_until_refusing(own)
        for answer in whole:
            assert answer.result().status_code == 503
            assert "shutting down" in answer.result().json()["error"]["message"]
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    assert own.engine.is_idle and own.engine.caches.num_bytes_in_use == 0


def test_an_engine_that_fails_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: DepthBatchingEngine) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(DepthBatchingEngine, "step", fail)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answers: list[httpx.Response] = []

    def call() -> None:
        transport = httpx.HTTPTransport(retries=8)  # until the server listens
        with httpx.Client(transport=transport, base_url=f"http://127.0.0.1:{port}") as client:
            answers.append(client.post("/v1/completions", json={"prompt": "x"}))

    with ThreadPoolExecutor(1) as callers:
        called = callers.submit(call)
        with pytest.raises(SystemExit, match="1"):
            main(["serve", *SIZES, "--port", str(port)])
        called.result()
    assert answers[0].status_code == 503 and "has failed" in answers[0].text
    assert "the device is lost" in capsys.readouterr().err


def test_closing_gives_up_what_still_runs() -> None:
    options = options_of(*SIZES)
    worker = EngineWorker(engine_of(options), max_waiting=4)

    async def follow(close_after: int) -> None:
        async for event in worker.events(Request((1,), 100)):
            if close_after == 0:
                threading.Thread(target=worker.close).start()
            assert event.finish_reason is None
            close_after -= 1

    for _ in range(2):  # one that runs, and one that comes too late
        with pytest.raises(UnavailableError, match="shutting down"):
            asyncio.run(follow(close_after=2))
    worker.close()
    assert worker.engine.is_idle and worker.engine.caches.num_bytes_in_use == 0


def test_a_request_that_the_engine_cannot_take_ends_alone() -> None:
    options = options_of(*SIZES)
    worker = EngineWorker(engine_of(options), max_waiting=4)

    async def follow(request: Request) -> list[int | None]:
        return [event.token async for event in worker.events(request)]

    with pytest.raises(TypeError):
        asyncio.run(follow(Request(("no id",), 3)))  # type: ignore[arg-type]
    assert len(asyncio.run(follow(Request((1,), 3)))) == 3
    worker.close()


def test_a_caller_whose_event_loop_is_gone_is_not_served_on() -> None:
    options = options_of(*SIZES)
    worker = EngineWorker(engine_of(options), max_waiting=4)
    loop = asyncio.new_event_loop()
    events = worker.events(Request((1,), 100))
    loop.run_until_complete(anext(events))
    loop.close()
    deadline = time.monotonic() + 10
    while worker.has_work and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.is_alive and not worker.has_work
    assert worker.engine.counters.generated_tokens < 100
    worker.close()


def test_options_reach_the_engine() -> None:
    sizes = ["--slots", "3", "--max-length", "40", "--chunk-size", "5", "--kv-mib", "0.5"]
    given = [*sizes, "--prefix-sharing", "all", "--dtype", "bfloat16"]
    for eight_bits in ("int8", "fp8"):
        engine = engine_of(options_of(*given, f"--{eight_bits}-kv"))
        cache = engine.caches.settings
        assert (cache.num_slots, cache.max_length, cache.kv_bytes) == (3, 40, 1 << 19)
        assert (cache.eight_bits, cache.prefix_sharing) == (eight_bits, "all")
        assert engine.scheduler.chunk_size == 5
        assert engine.runner.model.embedding.weight.dtype == torch.bfloat16
        assert len(list(engine.stream(Request((1, 2), 3)))) == 3


def test_a_server_compiles_before_it_listens() -> None:
    with torch.compiler.set_stance("force_eager"):  # the function of a graph, as it is
        engine = engine_of(options_of(*SIZES, "--compiler", "eager"))
        graph = engine.runner.links[0].static
        assert graph is not None and graph.has_tokens, "no tick has run"
        assert engine.is_idle and engine.counters.ticks == engine.counters.finished == 0
        assert engine.caches.num_bytes_in_use == 0


@pytest.mark.full
def test_a_compiled_server_answers_as_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    compiled, wanted = CompileCounterWithBackend("aot_eager"), serve.engine_options
    monkeypatch.setattr(
        serve, "engine_options", lambda given: replace(wanted(given), compiler=compiled)
    )
    with running() as own:
        assert compiled.frame_count == 1
        for number in range(1, 6):
            answer = own.post({"prompt": "x" * number, "max_tokens": 20, "temperature": 0, "n": 2})
            texts = {choice["text"] for choice in answer.json()["choices"]}
            assert texts == {own.alone("x" * number, 20)}
        assert compiled.frame_count == 1


def test_wrong_arguments_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for arguments in (
        ["--model", "nowhere"],
        ["--kv-mib", "0.001"],
        ["--compiler", "nothing"],
        ["--api-key-file", str(empty)],
        ["--api-key", ""],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["serve", *arguments])
        assert "error: " in capsys.readouterr().err


def test_the_command_generates_in_colour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = tmp_path / "text.txt"
    text.write_text("Some text to calibrate with. " * 40)
    arguments = ["Hello", "--max-new-tokens", "5", "--calibrate", str(text), "--dial", "0.6"]
    main(["generate", *arguments])
    output = capsys.readouterr().out
    plain = re.sub("\x1b\\[[0-9;]*m", "", output)
    assert plain != output and "Hello" in plain and "steps:" in plain and "tokens/s" in plain


def test_the_command_takes_any_admissible_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for numbers in (["--temperature", "1e-40", "--top-k", str(1 << 63)], []):
        main(["generate", "Hello", "--max-new-tokens", "5", *numbers])
        outputs.append(capsys.readouterr().out.partition("steps:")[0])
    assert outputs[0] == outputs[1]


def test_the_command_says_why_a_model_cannot_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = loading.load(None)
    with torch.no_grad():
        served.model.norm.weights[0].fill_(torch.inf)
    monkeypatch.setattr(generate, "load", lambda *_, **__: served)
    with pytest.raises(SystemExit, match="1"):
        main(["generate", "Hello", "--max-new-tokens", "5"])
    assert "not finite" in capsys.readouterr().err
