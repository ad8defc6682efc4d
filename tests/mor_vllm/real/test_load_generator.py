"""vLLM's public load generator, `vllm bench serve`, against `mor serve` instead of vLLM's own server."""

import argparse
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mor_vllm.models import served_model
from tests.mor_vllm.real.engines import save_with_tokenizer, wait_for

CALLS, PROMPT, ANSWER, AT_ONCE = 48, 24, 12, 12
"""Calls of a run, the tokens of their prompts and answers, and how many are open at once."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    save_with_tokenizer(served_model("make pretrain"), folder)
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def port(folder) -> Iterator[int]:
    """That of a `mor serve` which has fewer slots than calls are open."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sizes = ["--slots", "8", "--max-length", "64", "--kv-mib", "4", "--max-tokens", str(ANSWER)]
    command = [sys.executable, "-m", "mor_tools.commands", "serve", "--model", str(folder), *sizes]
    server = subprocess.Popen([*command, "--port", str(port)])
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.mark.parametrize(
    ("backend", "endpoint"),
    [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")],
)
def test_every_call_is_answered_in_full(folder, port, backend, endpoint):
    result = generate_load(folder, port, "--backend", backend, "--endpoint", endpoint)
    assert (result["completed"], result["failed"]) == (CALLS, 0)
    assert result["total_output_tokens"] == CALLS * ANSWER
    assert 0 < result["p50_ttft_ms"] <= result["p99_ttft_ms"]
    assert result["p50_itl_ms"] > 0  # tokens came one after another
    assert result["max_concurrent_requests"] >= AT_ONCE


def generate_load(folder: Path, port: int, *arguments: str) -> dict[str, Any]:
    """What the load generator reports."""
    from vllm.benchmarks.serve import add_cli_args, main

    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    sizes = ["--random-input-len", str(PROMPT), "--random-output-len", str(ANSWER)]
    load = ["--num-prompts", str(CALLS), "--max-concurrency", str(AT_ONCE), "--ignore-eos"]
    shown = ["--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", "--disable-tqdm"]
    server = ["--port", str(port), "--model", str(folder), "--served-model-name", folder.name]
    return main(parser.parse_args([*server, *sizes, *load, *shown, *arguments]))
