"""Several processes behind one port answer what one engine would, and end together."""

import os
import signal
import time
from collections.abc import Iterator

import httpx2 as httpx
import openai
import pytest

from mor_layers.generation import Request
from mor_tools.commands import main
from mor_tools.serving.engines.replicas import MOST_MORE, Replicas
from tests.mor_tools.serving.running import Running, engine_of, options_of, running

ARGUMENTS = ["--replicas", "2", "--prefix-sharing", "all"]
PROMPTS = ["Hello", "what", "a loop", "is", "x" * 40, "x" * 40 + "y"]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(*ARGUMENTS) as own:
        yield own


def replicas_of(server: Running) -> Replicas:
    assert isinstance(server.service.worker, Replicas)
    return server.service.worker


def alone(prompt: str, length: int) -> str:
    """What one engine on one rank says."""
    engine = engine_of(options_of("--slots", "4", "--max-length", "128", "--kv-mib", "1"))
    return "".join(e.text for e in engine.stream(Request(tuple(prompt.encode()), length)))


def assert_answers_are_those_of_one_engine(server: Running) -> None:
    answer = server.client.completions.create(
        model="random", prompt=PROMPTS, max_tokens=8, temperature=0
    )
    assert [choice.text for choice in answer.choices] == [alone(p, 8) for p in PROMPTS]


def test_two_replicas_answer_as_one_engine(server: Running) -> None:
    assert_answers_are_those_of_one_engine(server)
    counted = [worker.statistics.requests_finished for worker in replicas_of(server).workers]
    assert sum(counted) == len(PROMPTS) and min(counted) > 0
    metrics = httpx.get(f"{server.url}/metrics").text
    assert f"\nmor_requests_finished_total {len(PROMPTS)}\n" in metrics
    assert "\nmor_kv_bytes_in_use 0\n" in metrics


def test_a_prompt_goes_where_its_beginning_is_cached(server: Running) -> None:
    prompt = "the same beginning of thirty-two tokens and more, for a page to be full of it"
    cached = [
        server.client.completions.create(
            model="random", prompt=prompt + end, max_tokens=1
        ).usage.prompt_tokens_details.cached_tokens  # type: ignore[union-attr]
        for end in "abcd"
    ]
    assert cached[0] == 0 and min(cached[1:]) > 0


def test_a_busy_replica_is_not_preferred(server: Running) -> None:
    replicas = replicas_of(server)
    request = Request(tuple(b"a prompt that only this test knows"), 1)
    first = replicas._choose(request)
    replicas._open[first] = MOST_MORE
    assert replicas._choose(request) == first
    replicas._open[first] += 1
    assert replicas._choose(request) == 1 - first
    replicas._open[first] = 0
    assert replicas._choose(request) == 1 - first  # which has it in its cache now


def test_a_request_that_cannot_be_served_ends_alone(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="exceed"):
        server.client.completions.create(model="random", prompt="x" * 120, max_tokens=50)
    assert server.client.completions.create(model="random", prompt="Hello", max_tokens=1).choices


def test_a_call_that_is_left_is_cancelled(server: Running) -> None:
    stream = server.client.completions.create(
        model="random", prompt="Hello", max_tokens=100, stream=True
    )
    next(stream)
    stream.close()
    deadline = time.monotonic() + 20
    while replicas_of(server).has_work:
        assert time.monotonic() < deadline, "the request was not cancelled"
        time.sleep(0.02)


def test_a_text_follows_its_grammar(server: Running) -> None:
    answer = server.client.completions.create(
        model="random",
        prompt="x",
        max_tokens=6,
        n=4,
        extra_body={"structured_outputs": {"regex": "[ab]{6}"}},
    )
    assert all(set(c.text) <= {"a", "b"} and len(c.text) == 6 for c in answer.choices)


def test_a_server_that_lost_a_process_ends(server: Running) -> None:
    victim = replicas_of(server)._engines[1].processes[0]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    server.thread.join(timeout=40)  # so that a supervisor can start it again
    assert not server.thread.is_alive()
    assert "a process of the engine has ended" in str(server.service.worker.failure)
    assert not any(p.is_alive() for e in replicas_of(server)._engines for p in e.processes)


@pytest.mark.full
def test_two_replicas_of_two_ranks_answer_as_one_engine() -> None:
    with running(*ARGUMENTS, "--tensor-parallel", "2") as server:
        assert_answers_are_those_of_one_engine(server)
        with pytest.raises(openai.BadRequestError, match="a constraint keeps state"):
            server.client.completions.create(
                model="random", prompt="x", extra_body={"structured_outputs": {"regex": "[ab]+"}}
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "0"], "--replicas 0 must be at least 1"),
        pytest.param(
            ["--tensor-parallel", "3"],
            "num_heads=4 is not divisible by the 3 ranks",
            marks=pytest.mark.full,
        ),
        (["--replicas", "2", "--device", "cuda:1"], "names one device"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", *arguments])
    assert message in " ".join(capsys.readouterr().err.split())
