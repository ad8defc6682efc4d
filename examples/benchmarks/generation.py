"""Throughput of generation with a recursion, over that of a plain model in the same engine.

    python examples/benchmarks/generation.py --shapes 360M --json throughput.json

Weights are random; expert-choice routers are calibrated, on what the model itself writes, so that steps
keep the shares that they train for, (N_r-r+1)/N_r. Requests keep coming, so prompts, every write of keys
and values, logits and sampling are all in the figures. Models take turns and the median of the turns'
ratios counts. On a CPU, time is processor time of one thread, which other processes on the machine
disturb least.

Two comparisons: `equal_batch`, as many sequences in flight; `equal_kv`, as many bytes for keys and
values as some plain sequences take, filled with as many sequences as fit. Beside each ratio stand what
arithmetic alone allows (FLOPs), and what reading weights and keys alone allows (bytes): a processor that
waits for memory is near the second, one that waits for its multipliers near the first.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mor_layers import DecoderConfig, ExpertChoice, MoRTransformer, RecursionConfig
from mor_layers.costs import account
from mor_layers.generation import (
    CACHE_POLICIES,
    CacheSettings,
    DepthBatchingEngine,
    Request,
    Sampling,
    calibrate,
)
from mor_layers.recursion import KVPolicy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import machine

Budget = Literal["equal_batch", "equal_kv"]

HAS_GPU = torch.cuda.is_available()
SHAPES = {  # hidden, query heads, key-value heads, MLP, layers that a plain model has
    "small": (192, 6, 2, 512, 18),
    "135M": (576, 9, 3, 1536, 30),
    "360M": (960, 15, 5, 2560, 34),
}


@dataclass(frozen=True)
class Row:
    """One comparison."""

    shape: str
    num_recursions: int
    kv_policy: str
    budget: Budget
    throughput_ratio: float
    """Generated tokens per second over the plain model's, the median of the turns."""
    turns: tuple[float, ...]
    """The same ratio in each turn, in ascending order."""
    kv_bytes_ratio: float
    """Bytes that the routed layers keep of a token, over those of layers that keep everything."""
    mean_depth: float
    """Steps that a token took."""
    flop_limit: float
    """What FLOPs allow, at that depth."""
    byte_limit: float
    sequences: float
    """In flight, in the mean."""
    plain_sequences: float
    tokens_per_second: float
    plain_tokens_per_second: float
    engine_share: float
    """Of the time, what is spent outside the layers and the logits."""


def decoder_config(shape: str, vocabulary: int, steps: int, policy: KVPolicy) -> DecoderConfig:
    """A model of the shape; layers are added until they divide."""
    hidden, heads, kv_heads, ffn, layers = SHAPES[shape]
    recursion = None
    if steps > 1:
        recursion = RecursionConfig(steps, "middle_cycle", ExpertChoice(), policy)
        layers += -(layers - 2) % steps
    return DecoderConfig(vocabulary, hidden, ffn, layers, heads, kv_heads, recursion=recursion)


class Load:
    """An engine that is never without work.

    Args:
        slots: sequences in flight at most.
        kv_bytes: memory for keys and values.
    """

    def __init__(
        self, model: MoRTransformer, options: argparse.Namespace, slots: int, kv_bytes: int
    ) -> None:
        self.model, self.options, self.slots = model, options, slots
        self.longest_prompt = options.prompt + options.prompt // 2
        length = self.longest_prompt + options.new_tokens
        settings = CacheSettings(kv_bytes, slots, length + 1, page_size=4)
        # No prompt waits for its turn: that would hold the plain model up, whose ticks are fewer.
        every = slots * length
        self.engine = DepthBatchingEngine(model, settings, length, tokens_per_tick=every)
        self._random, self._numbers = random.Random(0), count()
        self._inside = 0.0
        for stack in (model.prelude, *(block.layers for block in model.recursions), model.coda):
            stack.forward = self._timed(stack.forward)  # type: ignore[method-assign]
        cached = self.engine.runner.cached
        cached.logits = self._timed(cached.logits)  # type: ignore[method-assign]

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = clock()
            try:
                return run(*arguments)
            finally:
                self._inside += clock() - began

        return timed

    @property
    def texts(self) -> Tensor:
        """Beginnings of what is in flight, `[b s]`: the longest few, as long as they all are."""
        running = self.engine.scheduler.running.values()
        texts = sorted((p.tokens for p in running), key=len)
        older = texts[max(len(texts) // 2, len(texts) - 12) :]
        return torch.tensor([text[: len(older[0])] for text in older])

    def run(self, tokens: int) -> tuple[float, float, float, float]:
        """Generate so many tokens.

        Returns:
            Tokens a second, sequences in flight, mean depth, and the engine's own share.
        """
        counters, vocabulary = self.engine.counters, self.model.config.vocab_size
        goal, self._inside = counters.generated_tokens + tokens, 0.0
        before, in_flight, ticks, began = replace(counters), 0, 0, clock()
        while counters.generated_tokens < goal:
            while self.engine.num_running + self.engine.num_waiting < self.slots + 2:
                number, new = next(self._numbers), self.options.new_tokens
                size = self._random.randint(self.options.prompt // 2 + 1, self.longest_prompt)
                if number < self.slots:  # of all ages, as in a server that has run for long
                    age = self._random.randrange(new)
                    size, new = size + age, new - age
                ids = tuple(self._random.randrange(vocabulary) for _ in range(size))
                self.engine.submit(Request(ids, new, Sampling(1.0, seed=number)))
            self.engine.step()
            in_flight, ticks = in_flight + self.engine.num_running, ticks + 1
        seconds = clock() - began
        done = counters.generated_tokens - before.generated_tokens
        # The last token of a request is never computed.
        computed = done + counters.prompt_tokens - before.prompt_tokens
        computed -= counters.finished - before.finished
        depth = (counters.steps - before.steps) / computed
        return done / seconds, in_flight / ticks, depth, 1 - self._inside / seconds


def clock() -> float:
    """Seconds of this thread's processor; of the wall where a GPU works."""
    if HAS_GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def sequence_bytes(config: DecoderConfig, length: int, itemsize: int) -> float:
    """Expected bytes of one sequence's keys and values."""
    return account(config, length).kv_bytes(bytes_per_number=itemsize)


def generated_flops(config: DecoderConfig, options: argparse.Namespace, depth: float) -> float:
    """FLOPs of a generated token of the given mean depth, its share of the prompt included."""
    length = options.prompt + options.new_tokens
    tokens, shares = None, _shares(config)
    if len(shares) > 1:
        deeper = (depth - 1) / (sum(shares) - 1)
        tokens = [length * min(1.0, share * deeper) for share in shares[1:]]
        tokens = [length, *tokens]
    cost = account(config, length, tokens, causal_half=True)
    # Logits are computed where a token is generated only.
    logits = cost.forward.output / length
    return (cost.forward.total - cost.forward.output) / options.new_tokens + logits


def numbers_read(
    config: DecoderConfig, options: argparse.Namespace, depth: float, sequences: float
) -> float:
    """Numbers, weights and keys, that are read for a generated token."""
    length = options.prompt + options.new_tokens / 2
    cost = account(config, round(length))
    weights = cost.parameters.total - cost.parameters.embedding
    runs = 2 if config.recursion is not None else 0
    layers = (config.num_unrolled_layers - runs) / len(_shares(config))
    row = 2 * config.kv_heads * config.head_size
    seen = sum(_seen(config)) * layers + runs
    # A tick reads the weights once, and finishes sequences / depth tokens.
    return weights * depth / sequences + seen * row * length


def _shares(config: DecoderConfig) -> tuple[float, ...]:
    if config.recursion is None:
        return (1.0,)
    steps = config.recursion.num_recursions
    return config.recursion.router.capacity_factors_for(steps) or (1.0,) * steps


def _seen(config: DecoderConfig) -> list[float]:
    """For each step, rows that its queries see times the share of tokens that run it."""
    shares = _shares(config)
    is_wise = config.recursion is None or config.recursion.kv_policy == "recursion_wise"
    return [share * (share if is_wise else shares[0]) for share in shares]


def kv_bytes_ratio(config: DecoderConfig) -> float:
    """Rows that the routed layers keep, over one for each step of each token."""
    assert config.recursion is not None
    kind, shares = CACHE_POLICIES[config.recursion.kv_policy], _shares(config)
    return sum(kind.rows_for(shares, 1.0)) / len(shares)


def compare(
    shape: str, steps: int, policy: KVPolicy, plain: MoRTransformer, options: argparse.Namespace
) -> Iterator[Row]:
    """One recursion against the plain model, under both budgets."""
    torch.manual_seed(1)
    dtype = getattr(torch, options.dtype)
    model = MoRTransformer(decoder_config(shape, options.vocabulary, steps, policy))
    model = model.to(options.device, dtype)
    length = options.prompt + options.new_tokens
    text = torch.randint(options.vocabulary, (8, length), device=options.device)
    calibrate(model, [text])  # roughly; what the model writes itself counts, see below
    sizes = [sequence_bytes(m.config, length, dtype.itemsize) for m in (plain, model)]
    for budget in options.budgets:
        if budget == "equal_batch":
            # Memory for half as much again: nobody has to give way.
            slots = [options.batch] * 2
            memory = [round(2 * options.batch * size) + (1 << 20) for size in sizes]
        else:
            # A sequence's pages are rounded up; the plain ones must fit too.
            total = round(options.kv_sequences * sizes[0] * 1.05)
            memory = [total, total]
            slots = [max(1, int(total / size)) for size in sizes]
        loads = [
            Load(m, options, s, b) for m, s, b in zip((plain, model), slots, memory, strict=True)
        ]
        for load in loads:  # fill up
            load.run(load.slots)
        for _ in range(2):  # what is written follows the depths, and they follow it
            calibrate(model, [loads[1].texts.to(options.device)])
            loads[1].run(loads[1].slots)
        rounds = [[load.run(options.tokens) for load in loads] for _ in range(options.turns)]
        ratios = tuple(sorted(own[0] / base[0] for base, own in rounds))
        base, own = ([statistics.median(r[i][j] for r in rounds) for j in range(4)] for i in (0, 1))
        flops = [generated_flops(m.config, options, r[2]) for m, r in ((plain, base), (model, own))]
        read = [
            numbers_read(m.config, options, r[2], r[1]) for m, r in ((plain, base), (model, own))
        ]
        yield Row(
            shape,
            steps,
            policy,
            budget,
            statistics.median(ratios),
            ratios,
            kv_bytes_ratio(model.config),
            mean_depth=own[2],
            flop_limit=flops[0] / flops[1],
            byte_limit=read[0] / read[1],
            sequences=own[1],
            plain_sequences=base[1],
            tokens_per_second=own[0],
            plain_tokens_per_second=base[0],
            engine_share=own[3],
        )


def hugging_face(plain: MoRTransformer, options: argparse.Namespace) -> float:
    """Tokens a second of `generate` of a Llama of the plain model's shape, at the same batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    own = plain.config
    config = LlamaConfig(
        vocab_size=own.vocab_size,
        hidden_size=own.hidden_size,
        intermediate_size=own.ffn_hidden_size,
        num_hidden_layers=own.num_unrolled_layers,
        num_attention_heads=own.num_heads,
        num_key_value_heads=own.kv_heads,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(options.device, getattr(torch, options.dtype)).eval()
    ids = torch.randint(own.vocab_size, (options.batch, options.prompt), device=options.device)
    speeds = []
    for _ in range(options.turns):
        began = clock()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=options.new_tokens,
                min_new_tokens=options.new_tokens,
                do_sample=False,
            )
        speeds.append(options.batch * options.new_tokens / (clock() - began))
    return statistics.median(speeds)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = options.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["small", "360M"])
    add("--recursions", nargs="+", type=int, default=[2, 3, 4])
    add(
        "--policies",
        nargs="+",
        choices=CACHE_POLICIES,
        default=["recursion_wise", "recursive_sharing"],
    )
    add(
        "--budgets",
        nargs="+",
        choices=("equal_batch", "equal_kv"),
        default=["equal_batch", "equal_kv"],
    )
    add("--batch", type=int, default=64, help="sequences in flight, equal_batch (default: 64)")
    add("--kv-sequences", type=int, default=16, help="plain ones of equal_kv (default: 16)")
    add("--prompt", type=int, default=2, help="mean length (default: 2, almost no prefix)")
    add("--new-tokens", type=int, default=96)
    add("--tokens", type=int, default=768, help="generated tokens of one turn (default: 768)")
    add("--turns", type=int, default=3)
    add("--vocabulary", type=int, default=2048, help="the logits cost both models alike")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and caches")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--hugging-face", action="store_true", help="also time `generate` of transformers")
    add("--json", metavar="FILE", help="write the rows here")
    return options


def main() -> None:
    """Compare and print."""
    options = parser().parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    console, rows, references = Console(), [], {}
    if not console.is_terminal:  # a file has room for every column
        console = Console(width=140)
    for shape in options.shapes:
        torch.manual_seed(0)
        plain = MoRTransformer(decoder_config(shape, options.vocabulary, 1, "recursion_wise"))
        plain = plain.to(options.device, getattr(torch, options.dtype))
        if options.hugging_face:
            references[shape] = hugging_face(plain, options)
            console.print(f"{shape}: transformers generates {references[shape]:.1f} tokens/s")
        for steps in options.recursions:
            for policy in options.policies:
                for row in compare(shape, steps, policy, plain, options):
                    rows.append(row)
                    console.print(
                        f"{shape} N_r={steps} {policy} {budget_name(row)}: "
                        f"x{row.throughput_ratio:.2f} (FLOPs allow x{row.flop_limit:.2f})"
                    )
    console.print(table(rows))
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        report = {
            "machine": machine(),
            "settings": settings,
            "rows": [asdict(row) for row in rows],
            "hugging_face_tokens_per_second": references,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


def budget_name(row: Row) -> str:
    """As people say it."""
    return row.budget.replace("_", " ")


def table(rows: list[Row]) -> Table:
    """The rows beside their limits."""
    made = Table("shape", "N_r", "KV policy", "budget", "sequences", "throughput", "depth")
    for name in ("FLOP limit", "byte limit", "KV bytes", "tokens/s", "engine's own"):
        made.add_column(name)
    for row in rows:
        made.add_row(
            row.shape,
            str(row.num_recursions),
            row.kv_policy,
            budget_name(row),
            f"{row.sequences:.0f} : {row.plain_sequences:.0f}",
            f"×{row.throughput_ratio:.2f}",
            f"{row.mean_depth:.2f}",
            f"×{row.flop_limit:.2f}",
            f"×{row.byte_limit:.2f}",
            f"{row.kv_bytes_ratio:.3f}",
            f"{row.tokens_per_second:.1f} : {row.plain_tokens_per_second:.1f}",
            f"{row.engine_share:.1%}",
        )
    return made


if __name__ == "__main__":
    main()
