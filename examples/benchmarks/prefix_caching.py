"""What sharing prefixes saves where requests share a system prompt, and what it costs where none do.

    python examples/benchmarks/prefix_caching.py

Two engines of the same random model take turns, one with prefix sharing and one without. `shared`: all
requests arrive at once and begin with the same tokens. `distinct`: no two requests have a prefix in
common, so every block is stored for nothing. The median of the rounds' ratios counts (`paired_timing`).
On a CPU, time is processor time of one thread, which other processes on the machine disturb least.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mor_layers import MoRTransformer
from mor_layers.generation import CACHE_POLICIES, CacheSettings, DepthBatchingEngine, Request

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import machine
from benchmarks.paired_timing import Estimate, Rounds, Timing
from benchmarks.serving.ours import clock
from benchmarks.serving.shapes import SHAPES, decoder_config


@dataclass(frozen=True)
class Result:
    """One workload: with prefix sharing over without."""

    workload: str
    kv_policy: str
    seconds: Estimate
    """Time for all requests."""
    first_token: Estimate
    """Mean time from arrival to the first token."""
    cached_share: float
    """Share of the prompts' tokens that were not computed."""
    without_seconds: float
    """Median time for all requests without sharing."""
    without_first_token: float


class Server:
    """An engine, and what it took for the requests of each run."""

    def __init__(self, model: MoRTransformer, settings: CacheSettings, chunk_size: int) -> None:
        self.engine = DepthBatchingEngine(model, settings, chunk_size)
        self.first_tokens: list[float] = []

    def run(self, requests: list[Request]) -> Timing:
        """Serve requests that arrive at once."""
        self.engine.prefixes.clear()  # or a run would find the prefixes of the previous one
        for request in requests:
            self.engine.submit(request)
        began, passed, waited = clock(), time.perf_counter(), []
        while not self.engine.is_idle:
            events = self.engine.step()
            waited += [clock() - began for event in events if event.prompt_depths]
        seconds = clock() - began
        self.first_tokens.append(statistics.mean(waited))
        is_processor_time = not next(self.engine.runner.model.parameters()).is_cuda
        share = seconds / (time.perf_counter() - passed) if is_processor_time else None
        return Timing(seconds, share)


def workloads(options: argparse.Namespace) -> Iterator[tuple[str, list[Request]]]:
    """The requests of each workload."""
    randomness, numbers = random.Random(0), count()

    def tokens(length: int) -> tuple[int, ...]:
        # The first token is unique, so that nothing is shared by chance.
        rest = (randomness.randrange(options.vocabulary) for _ in range(length - 1))
        return (next(numbers) % options.vocabulary, *rest)

    system, new = tokens(options.system), options.new_tokens
    if "shared" in options.workloads:
        own = [Request(system + tokens(options.own), new) for _ in range(options.requests)]
        yield "shared", own
    if "distinct" in options.workloads:
        yield "distinct", [Request(tokens(options.distinct), new) for _ in range(options.requests)]


def compare(options: argparse.Namespace) -> Iterator[Result]:
    """Both workloads under each policy."""
    for policy in options.policies:
        torch.manual_seed(0)
        config = decoder_config(options.shape, options.vocabulary, options.recursions, policy)
        model = MoRTransformer(config).to(options.device)
        length = max(options.system + options.own, options.distinct) + options.new_tokens
        settings = CacheSettings.for_all_steps(model, length, num_slots=options.requests)
        servers = [
            Server(model, replace(settings, prefix_sharing=sharing), options.chunk_size)
            for sharing in ("off", "all")
        ]
        for name, requests in workloads(options):
            for server in servers:  # the first run of an engine lays out its weights
                server.run(requests[:4])
                server.first_tokens.clear()
            rounds, plain = Rounds(), []
            for _ in range(options.rounds):
                timings = [servers[i].run(requests) for i in (0, 1, 1, 0)]
                rounds.add(*timings)
                plain += [timings[0].seconds, timings[3].seconds]
            counters = servers[1].engine.counters
            computed = counters.prompt_tokens + counters.cached_tokens
            yield Result(
                name,
                policy,
                rounds.estimate(),
                _first_tokens(*(server.first_tokens for server in servers)),
                counters.cached_tokens / computed,
                statistics.median(plain),
                statistics.median(servers[0].first_tokens),
            )
            for server in servers:
                server.engine.counters.prompt_tokens = server.engine.counters.cached_tokens = 0


def _first_tokens(without: list[float], shared: list[float]) -> Estimate:
    rounds = Rounds()
    for i in range(0, len(without), 2):
        seconds = (without[i], shared[i], shared[i + 1], without[i + 1])
        rounds.add(*(Timing(value) for value in seconds))
    return rounds.estimate()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = options.add_argument
    add("--shape", choices=SHAPES, default="small")
    add("--recursions", type=int, default=3)
    add("--policies", nargs="+", choices=CACHE_POLICIES, default=["recursive_sharing"])
    add("--workloads", nargs="+", choices=("shared", "distinct"), default=["shared", "distinct"])
    add("--requests", type=int, default=64)
    add("--system", type=int, default=512, help="tokens that all prompts begin with (default: 512)")
    add("--own", type=int, default=32, help="tokens of its own that each has (default: 32)")
    add("--distinct", type=int, default=96, help="tokens of prompts without a common prefix")
    add("--new-tokens", type=int, default=32)
    add("--chunk-size", type=int, default=64)
    add("--vocabulary", type=int, default=4096)
    add("--rounds", type=int, default=10)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, help="also write the results there")
    return options


def main() -> None:
    """Print a table, and write JSON if asked."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    results = []
    table = Table("workload", "policy", "time", "first token", "tokens not computed", "without")
    for result in compare(options):
        results.append(asdict(result))
        seconds, first = result.seconds, result.first_token
        table.add_row(
            result.workload,
            result.kv_policy,
            f"{seconds.ratio:.3f} ({seconds.low:.3f} to {seconds.high:.3f})",
            f"{first.ratio:.3f} ({first.low:.3f} to {first.high:.3f})",
            f"{result.cached_share:.1%}",
            f"{result.without_seconds:.2f} s, {result.without_first_token:.2f} s",
        )
        print(result, file=sys.stderr, flush=True)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
