"""Time of DALI's batches over those of Megatron-Core's dataset under PyTorch's DataLoader.

    python examples/benchmarks/data_loading.py --json ratios.json

Both read the same .bin/.idx pair of random ids in the same order, in the process that trains, without
reading ahead in others. The two take turns and the median of the turns' ratios counts. Time is the wall
time that one waits for a batch: `alone`, with nothing in between, or in `training`, where matrix
products take `--step` milliseconds: what is made ahead is then free, if there is a core to make it.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from mor_dali import BatchOrder, MegatronSamples, Prefetch, token_batches

VOCABULARY, END = 32_000, 0


@dataclass(frozen=True)
class Row:
    """One comparison; times are milliseconds a batch, medians of the turns."""

    sequence_length: int
    has_mask: bool
    """Whether batches hold the attention mask `[b 1 s s]` of their documents."""
    mode: str
    megatron_ms: float
    dali_ms: float
    ratio: float
    """Median of the turns' ratios, DALI's time over Megatron's."""
    spread: tuple[float, float]
    """Smallest and largest turn."""


class _Tokenizer:
    eod, vocab_size = END, VOCABULARY
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012


def dataset(folder: Path, length: int, samples: int, has_mask: bool) -> GPTDataset:
    """Random documents of 1 to 1000 tokens."""
    prefix = folder / f"text-{length}"
    if not prefix.with_suffix(".idx").exists():
        random = numpy.random.default_rng(1)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
        written = 0
        while written < samples * length // 2:
            ids = random.integers(1, VOCABULARY, random.integers(1, 1000))
            ids[-1] = END
            builder.add_document(torch.from_numpy(ids), [len(ids)])
            written += len(ids)
        builder.finalize(f"{prefix}.idx")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(folder / "order"),
        tokenizer=_Tokenizer(),  # type: ignore[arg-type]
        reset_position_ids=has_mask,
        reset_attention_mask=has_mask,
        eod_mask_loss=False,
        create_attention_mask=has_mask,
    )
    sizes = [samples, 0, 0]
    built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    return cast(GPTDataset, built[0])


def loaders(data: GPTDataset, size: int, ahead: int) -> list[Callable[[], Iterator[Any]]]:
    """Megatron's and DALI's."""
    samples = MegatronSamples(data)
    order = BatchOrder(end=len(samples), size=size)
    batches = [list(order[i]) for i in range(len(order))]
    return [
        lambda: iter(DataLoader(data, batch_sampler=batches)),
        lambda: token_batches(samples, order, Prefetch(batches=ahead)),
    ]


def waiting(load: Callable[[], Iterator[Any]], batches: int, step: float) -> float:
    """Milliseconds a batch that one waits, with `step` seconds of computing in between."""
    iterator, total, weight = load(), 0.0, torch.ones(256, 256)
    next(iterator)  # building and the first batch are not a step's
    for _ in range(batches):
        until = time.perf_counter() + step
        while time.perf_counter() < until:
            _ = weight @ weight
        began = time.perf_counter()
        next(iterator)
        total += time.perf_counter() - began
    return total / batches * 1e3


def compare(
    length: int, has_mask: bool, folder: Path, options: argparse.Namespace
) -> Iterator[Row]:
    """Both modes."""
    needed = (options.batches + 4) * options.batch
    data = dataset(folder, length, needed, has_mask)
    both = loaders(data, options.batch, options.ahead)
    for pair in islice(zip(*(load() for load in both), strict=True), 3):  # the same batches
        for name, values in pair[0].items():
            assert torch.equal(values, pair[1][name]), name
    for mode, step in (("alone", 0.0), ("training", options.step / 1e3)):
        turns = [
            [waiting(load, options.batches, step) for load in both] for _ in range(options.turns)
        ]
        ratios = [dali / megatron for megatron, dali in turns]
        times = [statistics.median(turn[i] for turn in turns) for i in (0, 1)]
        ratio = statistics.median(ratios)
        yield Row(length, has_mask, mode, *times, ratio, (min(ratios), max(ratios)))


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--lengths", nargs="+", type=int, default=[512, 2048])
    add("--batch", type=int, default=8, help="samples in a batch (default: 8)")
    add("--batches", type=int, default=30, help="batches of one turn (default: 30)")
    add("--ahead", type=int, default=2, help="batches that DALI makes ahead (default: 2)")
    add("--step", type=float, default=20, help="milliseconds of computing (default: 20)")
    add("--turns", type=int, default=5)
    add("--json", metavar="FILE", help="write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, table = [], Table("s", "mask", "mode", "Megatron ms", "DALI ms", "ratio", "turns")
    with tempfile.TemporaryDirectory() as folder:
        for length in options.lengths:
            for has_mask in (False, True):
                rows += compare(length, has_mask, Path(folder), options)
    for row in rows:
        table.add_row(
            str(row.sequence_length),
            "yes" if row.has_mask else "no",
            row.mode,
            f"{row.megatron_ms:.2f}",
            f"{row.dali_ms:.2f}",
            f"{row.ratio:.2f}",
            f"{row.spread[0]:.2f}–{row.spread[1]:.2f}",
        )
    Console().print(table)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1), "utf-8")


if __name__ == "__main__":
    main()
