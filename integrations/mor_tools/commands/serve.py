"""Serve a model over HTTP, in OpenAI's protocols for completions and for chat.

    mor serve --model runs/exported --port 8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "Once", "max_tokens": 20, "stream": true}'

Without --model a small model with random weights answers. POST /v1/chat/completions needs a chat
template in the model's folder. Beyond the protocol: `top_k`, `min_p`, `repetition_penalty`, `priority`,
`ignore_eos`, `stop_token_ids`, `timeout`, `cache_salt`, and in answers `depths`, the recursion steps of
each token. GET /metrics, /health and /v1/models. --replicas runs copies of the model in processes of
their own, and --tensor-parallel shards each over processes.
On SIGINT or SIGTERM the server takes no new calls, and ends the running ones within --grace seconds. An
engine that fails ends it with exit status 1.
"""

import argparse
import contextlib
import sys

from mor_layers.generation import CacheSettings
from mor_tools import terminal
from mor_tools.commands.command_line import flag
from mor_tools.serving.access import Access, read_keys
from mor_tools.serving.app import Limits, Service
from mor_tools.serving.engines.options import EngineOptions
from mor_tools.serving.engines.replicas import Replicas
from mor_tools.serving.engines.worker import EngineWorker
from mor_tools.serving.server import Server


def engine_options(options: argparse.Namespace) -> EngineOptions:
    """The engine of each process."""
    cache = CacheSettings(
        int(options.kv_mib * 2**20),
        options.slots,
        options.max_length,
        is_int8=options.int8_kv,
        is_fp8=options.fp8_kv,
        prefix_sharing=options.prefix_sharing,
    )
    return EngineOptions(
        options.model,
        cache,
        options.chunk_size,
        options.device,
        options.dtype,
        options.trust_remote_code,
        options.compiler,
    )


def build(options: argparse.Namespace) -> Service:
    """Build the service that the options describe.

    Raises:
        ValueError: an option is not allowed, or the model folder is incomplete.
        OSError: a file does not exist.
    """
    keys = [*options.api_key, *(read_keys(options.api_key_file) if options.api_key_file else ())]
    access = Access.bound_to(options.host, options.allowed_host, keys)
    limits = Limits(
        options.max_tokens, options.max_waiting, options.max_per_client, timeout=options.timeout
    )
    for name in ("replicas", "tensor_parallel"):
        if getattr(options, name) < 1:
            raise ValueError(f"{flag(name)} {getattr(options, name)} must be at least 1.")
    wanted = engine_options(options)
    with terminal.working(f"loading {options.model or 'a random model'}"):
        served = wanted.load()
        if options.replicas * options.tensor_parallel == 1:
            worker = EngineWorker(wanted.engine(served), limits.max_waiting)
        else:
            worker = Replicas(wanted, options.replicas, options.tensor_parallel, limits.max_waiting)
    return Service(worker, served, limits, access)


def run(options: argparse.Namespace) -> None:
    """Serve until told to stop; exits with code 1 if the engine fails.

    Raises:
        ValueError: an option is not allowed, or the model folder is incomplete.
        OSError: a file does not exist.
    """
    service = build(options)
    server = Server(service, options.grace, host=options.host, port=options.port)
    with contextlib.suppress(KeyboardInterrupt):  # SIGINT, after the calls have ended
        server.run()
    if service.worker.failure is not None:
        print(f"error: the engine has failed: {service.worker.failure!r}", file=sys.stderr)
        raise SystemExit(1)
