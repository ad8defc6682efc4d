"""Our engine beside stock vLLM: throughput, or time to the first token, in one run on one core.

    make bench-vllm                                       # throughput, fp32, the 360M shape
    make bench-vllm ARGUMENTS="--first-token --shape 135M"

vLLM serves the plain model, as the Llama that it is, in a process and an environment of its own. Our
engine serves the same weights, and a recursion of the same unrolled depth, of random weights, calibrated
to the shares that it trains for. Requests, precision and number of threads are the same, and tokens are
greedy; before anything is timed, vLLM must give the tokens that we give. Then the engines take turns on
one core (`serving.rounds`), and whoever does not run sleeps. Ratios are medians of the rounds, with
bootstrap intervals.

On a CPU, time is processor time of the engine's process, which other processes disturb least. The share
of the processor that the engines had is recorded: below 0.9, other work was in the way.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mor_layers import MoRTransformer
from mor_layers.generation import CACHE_POLICIES, calibrate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import machine
from benchmarks.paired_timing import estimate
from benchmarks.serving.feed import Requests
from benchmarks.serving.limits import Prices, Served, sequence_bytes
from benchmarks.serving.ours import EngineOptions, Load
from benchmarks.serving.profiles import operations
from benchmarks.serving.rounds import HEADINGS, Rounds, Row, into_page, take_turns
from benchmarks.serving.shapes import SHAPES, decoder_config
from benchmarks.serving.vllm_client import VLLMProcess

BLOCK = 128
"""Rows of a block of vLLM's cache on a CPU."""
OWN_SHARE = {"small": 0.08}
"""The most that an engine may take for itself, by shape; elsewhere 1 %."""


@dataclass
class Report:
    """What a run found."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Further figures by name, for the record."""

    def add_throughput(self, kind: str, rounds: Rounds, loads: dict[str, Load]) -> None:
        """Add the tokens per second of each engine, and what went on in ours."""
        self.facts[kind] = {
            name: {
                "tokens_per_second": rounds.rate(name),
                "sequences": rounds.in_flight(name),
                "processor_share": rounds.share(name),
                "mean_depth": loads[name].depth if name in loads else 1.0,
                "own_share": loads[name].own_share if name in loads else None,
            }
            for name in rounds.turns
        }


class Bench:
    """The models of a run, and the engines that serve them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.dtype = getattr(torch, options.dtype)
        torch.manual_seed(0)
        self.plain = self._model(1)
        self.routed = self._model(options.recursions)
        text = torch.randint(options.vocabulary, (8, 96), device=options.device)
        calibrate(self.routed, [text])  # roughly; what the model writes itself counts, see `settle`

    def requests(self, in_flight: int) -> Requests:
        """What is asked of each engine."""
        own = self.options
        shortest, longest = own.prompt // 2 + 1, own.prompt + own.prompt // 2
        if own.first_token:
            shortest = longest = own.prompt
        return Requests(shortest, longest, own.new_tokens, own.vocabulary, in_flight)

    def vllm(self) -> VLLMProcess:
        """vLLM with room for all requests."""
        own, most = self.options, self.requests(self.options.batch)
        rows = (most.in_flight + 1) * BLOCK * math.ceil((most.longest + 1) / BLOCK)
        settings = {
            "kv_cache_memory_bytes": round(rows * self.bytes_of(self.plain, 1)),
            "max_num_batched_tokens": own.tokens_per_tick or most.in_flight * most.longest,
            "enforce_eager": own.vllm_eager,
        }
        return VLLMProcess(own.vllm_python, self.plain, most, settings)

    def bytes_of(self, model: MoRTransformer, length: float) -> float:
        """Expected bytes of a sequence's keys and values."""
        return sequence_bytes(model.config, round(length), self.dtype.itemsize)

    def load(self, model: MoRTransformer, in_flight: int, kv_bytes: int | None = None) -> Load:
        """Our engine, settled.

        Args:
            kv_bytes: memory for keys and values. Default: so much that nobody has to give way.
        """
        own, requests = self.options, self.requests(in_flight)
        if kv_bytes is None:
            kv_bytes = round(1.5 * in_flight * self.bytes_of(model, requests.longest)) + (1 << 20)
        load = Load(
            model,
            requests,
            kv_bytes,
            EngineOptions(
                own.page_size,
                own.chunk_size,
                own.tokens_per_tick,
                None if model is self.plain else own.compiler,  # which is for a recursion
                temperature=0.0,
            ),
        )
        load.settle()
        return load

    def require_equal(self, vllm: VLLMProcess) -> str:
        """Require that vLLM continues texts as our engine does. Returns what was compared.

        Raises:
            RuntimeError: it does not, for more than 0.3 % of the tokens (in bf16, 10 %). Where two
                logits are closer than rounding, either is right.
        """
        requests, number = self.requests(20), 20
        source = torch.Generator().manual_seed(7)
        prompts = [
            torch.randint(requests.vocabulary, (length,), generator=source).tolist()
            for length in torch.linspace(1, requests.longest_prompt, number).long().tolist()
        ]
        new_tokens = min(24, requests.new_tokens)
        theirs = vllm.answers(prompts, new_tokens)
        ours = Load.answers(self.plain, prompts, new_tokens)
        # Each text up to the first token that differs; what follows is another text.
        alike = [_common(own, other) for own, other in zip(ours, theirs, strict=True)]
        others = sum(length < new_tokens for length in alike)
        said = f"{others} of {sum(alike) + others} greedy tokens are chosen otherwise"
        if others > (0.003 if self.dtype == torch.float32 else 0.1) * (sum(alike) + others):
            raise RuntimeError(f"vLLM does not serve the same model: {said}.")
        return said

    def take_turns(self, vllm: VLLMProcess, loads: dict[str, Load], minutes: float) -> Rounds:
        """vLLM and our engines, in rounds."""
        own = self.options
        engines = {"vllm": vllm.run} | {name: load.run for name, load in loads.items()}
        for run in engines.values():  # vLLM fills up; everyone's memory is touched
            run(own.tokens)
        for load in loads.values():
            load.forget()
        return take_turns(
            engines,
            own.tokens,
            own.rounds,
            minutes,
            lambda number: print(f"round {number}", end="\r", file=sys.stderr, flush=True),
        )

    def _model(self, steps: int) -> MoRTransformer:
        own = self.options
        policy = "recursion_wise" if steps == 1 else own.policy
        config = decoder_config(own.shape, own.vocabulary, steps, policy, own.layers)
        return MoRTransformer(config).to(own.device, self.dtype)


def _common(one: list[int], other: list[int]) -> int:
    """Length of the beginning that both have."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(one))


def throughput(bench: Bench, vllm: VLLMProcess) -> Report:
    """Tokens per second at equal batch and at equal bytes for keys and values."""
    own, report = bench.options, Report()
    few, many = own.kv_sequences, own.batch
    name = f"MoR-{own.recursions} {own.policy}"

    vllm.load(bench.requests(many))
    loads = {
        "plain": bench.load(bench.plain, many),
        "plain, few": bench.load(bench.plain, few),
        "routed": bench.load(bench.routed, many),
    }
    rounds = bench.take_turns(vllm, loads, own.minutes / 2)
    report.add_throughput("equal batch", rounds, loads)
    served = {key: bench_served(load, rounds, key) for key, load in loads.items()}
    prices = Prices.of(
        (served["plain, few"], 1 / rounds.rate("plain, few")),
        (served["plain"], 1 / rounds.rate("plain")),
    )
    report.facts["seconds_per_gflop"] = 1e9 * prices.flop
    report.facts["seconds_per_gb_read"] = 1e9 * prices.number / bench.dtype.itemsize

    def allowed(load: str, beside: str) -> float:
        return prices.seconds(served[beside]) / prices.seconds(served[load])

    def add(*row: Any) -> None:
        report.rows.append(Row(*row))

    add("plain ÷ vLLM's plain", rounds.throughput("plain", "vllm"), 1.0)
    add(f"{name} ÷ vLLM's plain, equal batch", rounds.throughput("routed", "vllm"), 1.65)
    most = allowed("routed", "plain")
    report.facts["allowed over plain, equal batch"] = most
    reached = rounds.throughput("routed", "plain", 1 / most)
    add(f"{name} ÷ plain, of ×{most:.2f} allowed, equal batch", reached, 0.97)
    for key, title in (("plain", "plain"), ("routed", name)):
        shares = loads[key].own_shares
        found = estimate(shares, rounds.share(key))
        add(f"engine's own share, {title}", found, OWN_SHARE.get(own.shape, 0.01), False)
    if own.profile:
        report.facts["operations"] = {
            key: [asdict(found) for found in operations(loads[key])] for key in ("plain", "routed")
        }

    del loads["plain"], loads["routed"]
    total = round(1.05 * few * bench.bytes_of(bench.plain, bench.requests(few).longest))
    fitting = int(total / bench.bytes_of(bench.routed, bench.requests(few).longest))
    vllm.load(bench.requests(few))
    loads["routed"] = bench.load(bench.routed, fitting, total)
    rounds = bench.take_turns(vllm, loads, own.minutes / 2)
    report.add_throughput("equal kv", rounds, loads)
    served["routed"] = bench_served(loads["routed"], rounds, "routed")
    add(f"{name} ÷ vLLM's plain, equal KV", rounds.throughput("routed", "vllm"), 3.2)
    most = allowed("routed", "plain, few")
    report.facts["allowed over plain, equal kv"] = most
    reached = rounds.throughput("routed", "plain, few", 1 / most)
    add(f"{name} ÷ plain, of ×{most:.2f} allowed, equal KV", reached, 0.97)
    return report


def first_token(bench: Bench, vllm: VLLMProcess) -> Report:
    """Time from the arrival of a request to its first token, while others are in flight."""
    own, report = bench.options, Report()
    vllm.load(bench.requests(own.batch))
    loads = {
        "plain": bench.load(bench.plain, own.batch),
        "routed": bench.load(bench.routed, own.batch),
    }
    rounds = bench.take_turns(vllm, loads, own.minutes)
    report.add_throughput("first token", rounds, loads)
    report.facts["seconds_to_first_token"] = {name: rounds.waits(name) for name in rounds.turns}
    for key, title in (("plain", "plain"), ("routed", f"MoR-{own.recursions} {own.policy}")):
        for percentile in (50, 99):
            found = rounds.wait_ratio(key, "vllm", percentile)
            row = Row(f"first token, p{percentile}, {title} ÷ vLLM's plain", found, 1.0, False)
            report.rows.append(row)
    return report


def bench_served(load: Load, rounds: Rounds, name: str) -> Served:
    """What an engine of ours did in its rounds, for `limits`."""
    requests = load.feed.requests
    return Served(
        load.model.config, requests.prompt, requests.new_tokens, load.depth, rounds.in_flight(name)
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = options.add_argument
    add("--vllm-python", required=True, help="the Python of an environment with vLLM")
    add("--vllm-eager", action="store_true", help="vLLM runs operation by operation, not compiled")
    add("--first-token", action="store_true", help="time to the first token, not throughput")
    add("--shape", choices=SHAPES, default="360M")
    add("--layers", type=int, help="of the plain model, instead of those of the shape")
    add("--recursions", type=int, default=4)
    add("--policy", choices=CACHE_POLICIES, default="recursive_sharing")
    add("--batch", type=int, default=64, help="sequences in flight (default: 64)")
    add("--kv-sequences", type=int, default=16, help="plain ones of equal KV (default: 16)")
    add("--prompt", type=int, help="mean length (default: 2; 512 with --first-token, all as long)")
    add("--new-tokens", type=int, help="(default: 96; 64 with --first-token)")
    add("--tokens", type=int, default=192, help="generated in a turn (default: 192)")
    add("--rounds", type=int, default=40, help="at most (default: 40)")
    add("--minutes", type=float, default=7, help="for all rounds together (default: 7)")
    add("--vocabulary", type=int, default=2048)
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and caches")
    add("--page-size", type=int, default=4, help="rows of a page of our cache (default: 4)")
    add("--chunk-size", type=int, help="of our engine (default: whole prompts)")
    add("--tokens-per-tick", type=int, help="of both engines (default: all that is in flight)")
    add("--compiler", help="backend of torch.compile for our engine with the recursion")
    add("--profile", action="store_true", help="also record our operations by their time")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--core", type=int, help="the CPU that all engines run on (default: the last one)")
    add("--page", type=Path, metavar="FILE", help="a page of Markdown that has the table")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    return options


def main() -> None:
    """Measure, print a table, and write a record if asked."""
    options = parser().parse_args()
    if options.prompt is None:
        options.prompt = 512 if options.first_token else 2
    if options.new_tokens is None:
        options.new_tokens = 64 if options.first_token else 96
    if options.device == "cpu":
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {max(cores) if options.core is None else options.core})
    console = Console() if sys.stdout.isatty() else Console(width=120)
    bench = Bench(options)
    with bench.vllm() as vllm:
        said = bench.require_equal(vllm)
        console.print(f"vLLM {vllm.facts['version']}: {said}")
        report = (first_token if options.first_token else throughput)(bench, vllm)
    table = Table(*HEADINGS)
    for row in report.rows:
        table.add_row(*row.cells)
    console.print(table)
    if options.page:
        kind = "first token" if options.first_token else "throughput"
        page = into_page(options.page.read_text("utf-8"), kind, report.rows)
        options.page.write_text(page, "utf-8")
    console.print_json(data={k: v for k, v in report.facts.items() if k.startswith("equal")})
    if options.json:
        outputs = ("json", "page", "vllm_python")
        settings = {name: value for name, value in vars(options).items() if name not in outputs}
        record = {"machine": machine(), "settings": settings, "vllm": vllm.facts, "equality": said}
        record |= {"rows": [asdict(r) | {"verdict": r.verdict} for r in report.rows]}
        options.json.write_text(json.dumps(record | report.facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
