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
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from mor_layers import MoRTransformer
from mor_layers.generation import CACHE_POLICIES, calibrate
from mor_layers.recursion import KVPolicy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import machine
from benchmarks.serving.feed import Requests, Turn
from benchmarks.serving.limits import Served, kv_bytes_ratio, sequence_bytes
from benchmarks.serving.ours import EngineOptions, Load, clock
from benchmarks.serving.shapes import SHAPES, decoder_config

Budget = Literal["equal_batch", "equal_kv"]


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


def compare(
    shape: str, steps: int, policy: KVPolicy, plain: MoRTransformer, options: argparse.Namespace
) -> Iterator[Row]:
    """One recursion against the plain model, under both budgets."""
    torch.manual_seed(1)
    dtype = getattr(torch, options.dtype)
    config = decoder_config(shape, options.vocabulary, steps, policy, options.layers)
    model = MoRTransformer(config).to(options.device, dtype)
    length = options.prompt + options.new_tokens
    text = torch.randint(options.vocabulary, (8, length), device=options.device)
    calibrate(model, [text])  # roughly; what the model writes itself counts, see `settle`
    sizes = [sequence_bytes(m.config, length, dtype.itemsize) for m in (plain, model)]
    shortest, longest = options.prompt // 2 + 1, options.prompt + options.prompt // 2
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
        loads = []
        for own, number, size in zip((plain, model), slots, memory, strict=True):
            requests = Requests(
                shortest, longest, options.new_tokens, options.vocabulary, number, waiting=2
            )
            # A compiler is for a recursion; the plain model runs operation by operation.
            engine = EngineOptions(compiler=None if own is plain else options.compiler)
            loads.append(Load(own, requests, size, engine))
            loads[-1].settle()
        rounds = [[load.run(options.tokens) for load in loads] for _ in range(options.turns)]
        ratios = tuple(sorted(own.rate / base.rate for base, own in rounds))
        base, own = (
            _Medians.of([turns[place] for turns in rounds], load, options)
            for place, load in enumerate(loads)
        )
        yield Row(
            shape,
            steps,
            policy,
            budget,
            statistics.median(ratios),
            ratios,
            kv_bytes_ratio(model.config),
            mean_depth=own.served.depth,
            flop_limit=base.served.flops / own.served.flops,
            byte_limit=base.served.numbers_read / own.served.numbers_read,
            sequences=own.served.sequences,
            plain_sequences=base.served.sequences,
            tokens_per_second=own.rate,
            plain_tokens_per_second=base.rate,
            engine_share=own.own_share,
        )


@dataclass(frozen=True)
class _Medians:
    """Of the turns of an engine."""

    rate: float
    own_share: float
    served: Served

    @classmethod
    def of(cls, turns: list[Turn], load: Load, options: argparse.Namespace) -> "_Medians":
        in_flight = statistics.median(turn.in_flight for turn in turns)
        length = options.prompt, options.new_tokens
        served = Served(load.model.config, *length, load.depth, in_flight)
        return cls(statistics.median(turn.rate for turn in turns), load.own_share, served)


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
    add("--layers", type=int, help="of the plain model, instead of those of the shape")
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
    add("--compiler", help="backend of torch.compile for the engine with a recursion")
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
        plain = MoRTransformer(
            decoder_config(shape, options.vocabulary, 1, "recursion_wise", options.layers)
        )
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
