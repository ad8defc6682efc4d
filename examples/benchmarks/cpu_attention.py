"""Attention to the cache on a CPU: our kernel beside PyTorch's operations, for each format of rows.

    python examples/benchmarks/cpu_attention.py            # the 360M shape, 64 tokens, one thread

Both read the same rows of the same cache, whose pages lie in no order, in rounds that take turns. Times
are those of the thread that computes.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mor_layers.cpu_kernels import without_cpu_kernels
from mor_layers.generation.cache import CachedAttention, KVArena, Visible

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.paired_timing import Estimate, Timing, measure

PAGE_SIZE = 4


@dataclass(frozen=True)
class Case:
    """What a layer attends to."""

    title: str
    fewest: int
    """Rows that a token sees, at least."""
    most: int
    dtype: torch.dtype = torch.float32
    is_int8: bool = False
    is_prompt: bool = False
    """The tokens are a prompt of `most`, each of which sees those up to itself."""


CASES = (
    Case("single tokens, 2 to 98 rows, fp32", 2, 98),
    Case("single tokens, 2 to 98 rows, bf16", 2, 98, torch.bfloat16),
    Case("single tokens, 200 to 512 rows, fp32", 200, 512),
    Case("single tokens, 200 to 512 rows, bf16", 200, 512, torch.bfloat16),
    Case("single tokens, 200 to 512 rows, int8", 200, 512, is_int8=True),
    Case("a prompt of 512 tokens, fp32", 512, 512, is_prompt=True),
)


def attention_of(
    case: Case, num_tokens: int, heads: tuple[int, int], size: int
) -> Callable[[], object]:
    """A call that attends in one layer, by whatever is chosen when this is called."""
    source = torch.Generator().manual_seed(0)
    pages_of_list = -(-case.most // PAGE_SIZE)
    num_lists = 1 if case.is_prompt else num_tokens
    num_pages = num_lists * pages_of_list
    bits = "int8" if case.is_int8 else None
    arena = KVArena(1, num_pages * PAGE_SIZE, heads[1], size, case.dtype, eight_bits=bits)
    rows = torch.arange(num_pages * PAGE_SIZE)
    shape = (2, len(rows), heads[1], size)
    arena.write(0, rows, *torch.randn(shape, generator=source).to(case.dtype))
    pages = torch.randperm(num_pages, generator=source)
    table = (pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).view(num_lists, -1)
    if case.is_prompt:
        lists, counts = torch.zeros(case.most, dtype=torch.long), torch.arange(case.most) + 1
    else:
        lists = torch.arange(num_tokens)
        counts = torch.randint(case.fewest, case.most + 1, (num_tokens,), generator=source)
    query = torch.randn(len(lists), heads[0], size, generator=source).to(case.dtype)
    attention = CachedAttention(Visible(table, lists, counts), lists, arena, heads[0])
    return lambda: attention(arena, 0, query)


def timed(run: Callable[[], object]) -> Timing:
    """Some calls."""
    began = time.thread_time()
    for _ in range(4):
        run()
    return Timing((time.thread_time() - began) / 4)


def main() -> None:
    """Measure each case and print a table."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = options.add_argument
    add("--tokens", type=int, default=64, help="single tokens of a tick (default: 64)")
    add("--heads", type=int, nargs=2, default=(15, 5), help="of queries and keys (default: 15 5)")
    add("--head-size", type=int, default=64)
    add("--rounds", type=int, default=40, help="at most (default: 40)")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    table = Table("attention of a layer", "kernel", "PyTorch", "ratio", "95 % interval", "rounds")
    for case in CASES:
        seconds: dict[str, list[float]] = {"kernel": [], "PyTorch": []}
        sizes = chosen.tokens, tuple(chosen.heads), chosen.head_size
        with torch.inference_mode():
            kernel = attention_of(case, *sizes)
            with without_cpu_kernels():
                plain = attention_of(case, *sizes)

            def noted(name: str, run: Callable[[], object], own: dict[str, list[float]]) -> Timing:
                timing = timed(run)
                own[name].append(1e3 * timing.seconds)
                return timing

            kernel(), plain()
            found: Estimate = measure(
                lambda run=plain, own=seconds: noted("PyTorch", run, own),
                lambda run=kernel, own=seconds: noted("kernel", run, own),
                most_rounds=chosen.rounds,
            )
        times = (f"{torch.tensor(own).median().item():.2f} ms" for own in seconds.values())
        interval = f"{found.low:.2f}–{found.high:.2f}"
        table.add_row(case.title, *times, f"{found.ratio:.2f}", interval, str(found.rounds))
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)


if __name__ == "__main__":
    main()
