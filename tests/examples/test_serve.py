"""The server, called as its users call it."""

import asyncio
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
import uvicorn

import generate
import serve
from mor_layers.generation import DepthBatchingEngine, Request, Sampling
from mor_tools.serving.app import Service
from mor_tools.serving.worker import EngineWorker, OverloadedError

SIZES = ["--slots", "4", "--max-length", "128", "--kv-mib", "1", "--max-tokens", "100"]


class Running:
    """A server in a thread, on a free port."""

    def __init__(self, *arguments: str) -> None:
        options = serve.parser().parse_args([*SIZES, *arguments])
        self.service: Service = serve.build(options)
        config = uvicorn.Config(self.service.app(), log_level="error", timeout_graceful_shutdown=5)
        self.server = uvicorn.Server(config)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def engine(self) -> DepthBatchingEngine:
        return self.service.worker.engine

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()
        self.socket.close()

    def alone(self, prompt: str, max_tokens: int, **settings) -> str:
        """What an engine of one's own says."""
        served = serve.load(None)
        cache = self.engine.caches.settings
        engine = DepthBatchingEngine(served.model, cache, decode=served.tokenizer.decode)
        request = Request(tuple(prompt.encode()), max_tokens, Sampling(**settings))
        return "".join(event.text for event in engine.stream(request))

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 10
        while not self.engine.is_idle:
            assert time.monotonic() < deadline, "requests are left over"
            time.sleep(0.01)
        assert self.engine.caches.num_bytes_in_use == 0


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    running = Running()
    yield running
    running.stop()


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
        ({"model": "other"}, "is not here"),
        ({"prompt": ""}, "ids is empty"),
        ({"prompt": [1, 999]}, "vocabulary"),
        ({"prompt": "x" * 200}, "exceed max_length"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 101}, "1..100"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 40}, "choices in all"),
        ({"logprobs": 3}, "not supported"),
        ({"stop": ["a"] * 5}, "up to 4"),
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


def test_bodies_that_are_no_calls(server: Running) -> None:
    url = f"{server.url}/v1/completions"
    for body, status in ((b"{", 400), (b"[]", 400), (b"\xff", 400), (b" " * (1 << 21), 413)):
        answer = httpx.post(url, content=body)
        assert answer.status_code == status and answer.json()["error"]["message"]
    assert httpx.get(url).status_code == 405


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


def test_too_many_calls_are_turned_away() -> None:
    running = Running("--max-waiting", "0")
    with pytest.raises(openai.RateLimitError, match="Try again later"):
        running.client.completions.create(model="random", prompt="x")
    running.stop()


def test_shutdown_lets_calls_end_and_takes_no_new_ones() -> None:
    running = Running()
    stream = running.client.completions.create(
        model="random", prompt="x", max_tokens=40, temperature=0, stream=True
    )
    chunks = [next(iter(stream))]
    running.server.should_exit = True
    chunks += list(stream)
    assert len(chunks) == 40 and chunks[-1].choices[0].finish_reason == "length"
    running.stop()
    assert not running.service.worker.is_alive
    assert running.engine.is_idle and running.engine.caches.num_bytes_in_use == 0


def test_closing_gives_up_what_still_runs() -> None:
    options = serve.parser().parse_args(SIZES)
    worker = EngineWorker(serve.build_engine(options, serve.load(None)), max_waiting=4)

    async def follow(close_after: int) -> None:
        async for event in worker.events(Request((1,), 100)):
            if close_after == 0:
                threading.Thread(target=worker.close).start()
            assert event.finish_reason is None
            close_after -= 1

    for _ in range(2):  # one that runs, and one that comes too late
        with pytest.raises(OverloadedError, match="going down"):
            asyncio.run(follow(close_after=2))
    worker.close()
    assert worker.engine.is_idle and worker.engine.caches.num_bytes_in_use == 0


def test_wrong_arguments_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--model", "nowhere"], ["--kv-mib", "0.001"]):
        with pytest.raises(SystemExit, match="2"):
            serve.main(arguments)
        assert "error: " in capsys.readouterr().err


def test_the_command_generates_in_colour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = tmp_path / "text.txt"
    text.write_text("Some text to calibrate with. " * 40)
    arguments = ["Hello", "--max-new-tokens", "5", "--calibrate", str(text), "--dial", "0.6"]
    generate.main(arguments)
    output = capsys.readouterr().out
    plain = re.sub("\x1b\\[[0-9;]*m", "", output)
    assert plain != output and "Hello" in plain and "steps:" in plain and "tokens/s" in plain
