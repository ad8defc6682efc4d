"""Plan a training run: which parallel layouts fit, and how long a step should take.

    mor plan examples/configs/cluster_360m.yaml --gpus 64 --hardware h100 --picture plan.png
    mor plan examples/configs/cluster_360m.yaml --gpus 1 --inference

Nothing is built and no GPU is needed: all figures are counted from the settings.
"""

import argparse
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mor_tools.planner import (
    FP32_TFLOPS,
    HARDWARE,
    RECOMPUTE,
    Hardware,
    Plan,
    Recompute,
    Search,
    Workload,
    describe,
    draw,
    inference_table,
    nearest,
    parts_table,
    plans_table,
    refusals,
    search,
    starvation,
)
from mor_tools.pretraining.command_line import read_settings
from mor_tools.pretraining.models.workload import workload
from mor_tools.pretraining.settings import Settings

GIB = 2**30
MOST_DEVICES = 10**9
"""With more devices, enumerating the layouts would take minutes."""


def add_arguments(options: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = options.add_argument
    add("config", type=Path, help="YAML file of a pretraining run")
    add("--gpus", type=int, required=True, help="devices")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    add("--hardware", default="h100", help=f"one of {', '.join(HARDWARE)} (default: h100)")
    add("--tflops", type=float, help="peak of a device in TFLOP/s at the training precision")
    add("--memory-gib", type=float, help="memory of a device in GiB")
    add("--intra-gbps", type=float, help="bandwidth of a device within its node in 1e9 bytes/s")
    add("--inter-gbps", type=float, help="bandwidth of a device to other nodes in 1e9 bytes/s")
    add("--per-node", type=int, help="devices per node")
    add(
        "--efficiency",
        type=float,
        default=0.5,
        help="fraction of the peak that is reached (default: 0.5)",
    )
    add("--micro-batch-sizes", help="e.g. 1,2,4 (default: the file's, half and double of it)")
    add("--recompute", help="e.g. none,full (default: the file's)")
    add("--vocab-size", type=int, help="vocabulary size, instead of the tokenizer's")
    add("--top", type=int, default=10, help="number of layouts to show (default: 10)")
    add("--inference", action="store_true", help="instead, how many sequences fit while generating")
    add("--json", type=Path, metavar="FILE", help="write every layout that fits to a file")
    add("--picture", type=Path, metavar="FILE", help="draw memory and time of the best layout")


def run(options: argparse.Namespace) -> None:
    """Plan a training run.

    Raises:
        ValueError: settings contradict one another, or no layout fits.
        OSError: a file does not exist or cannot be written.
    """
    if not 1 <= options.gpus <= MOST_DEVICES:
        raise ValueError(f"--gpus {options.gpus} must be at least 1 and at most {MOST_DEVICES}.")
    if options.top < 1:
        raise ValueError(f"--top {options.top} must be at least 1.")
    for change in options.set:
        if "=" not in change:
            raise ValueError(f"--set {change} is not a key=value setting.")
    settings = read_settings(str(options.config), options.set)
    try:
        _plan(options, settings)
    except OverflowError as error:
        raise ValueError(
            f"the given sizes are too large to be counted ({error}). Use smaller ones."
        ) from error


def _plan(options: argparse.Namespace, settings: Settings) -> None:
    work, hardware = workload(settings, options.vocab_size), _hardware(options, settings)
    console = Console()
    console.print(describe(work, options.gpus, hardware, options.efficiency))
    if options.inference:
        console.print(inference_table(work, options.gpus, hardware))
        return
    chosen = settings.training.micro_batch_size
    sizes = _numbers(options.micro_batch_sizes) or _around(chosen)
    recompute = _recompute(options.recompute) or (settings.training.recompute,)
    found = search(work, options.gpus, hardware, sizes, recompute, options.efficiency)
    if not found.fitting:
        raise ValueError(_nothing_fits(work, options.gpus, hardware, found))
    best = found.fitting[: options.top]
    console.print(plans_table(best, len(found.fitting)))
    console.print(parts_table(best))
    console.print(refusals(found, hardware))
    for warning in starvation(work, options.gpus, found.fitting, options.efficiency, chosen):
        console.print(f"warning: {warning}", soft_wrap=True, highlight=False)
    if options.json:
        rows = [_row(plan) for plan in found.fitting]
        refused = dict(found.refused)
        report = {"hardware": asdict(hardware), "gpus": options.gpus, "plans": rows,
                  "too_large": len(found.too_large), "refused": refused}  # fmt: skip
        options.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    if options.picture:
        draw(best, hardware).savefig(options.picture, dpi=120)


def _hardware(options: argparse.Namespace, settings: Settings) -> Hardware:
    if options.hardware not in HARDWARE:
        raise ValueError(
            f"--hardware {options.hardware} is unknown. Use one of {', '.join(HARDWARE)}, or "
            "describe other hardware by --tflops, --memory-gib, --intra-gbps and --inter-gbps."
        )
    chosen = HARDWARE[options.hardware]
    if settings.training.precision == "fp32":
        chosen = replace(chosen, tflops=FP32_TFLOPS[chosen.name])
    names = ("tflops", "memory_gib", "intra_gbps", "inter_gbps", "per_node")
    given = {name: getattr(options, name) for name in names}
    return replace(chosen, **{name: value for name, value in given.items() if value is not None})


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise ValueError(f"--micro-batch-sizes {text}: expected numbers such as 1,2,4.")
    return tuple(int(part) for part in text.split(","))


def _around(size: int) -> tuple[int, ...]:
    """Micro-batch sizes to try if none are given."""
    return tuple(sorted({max(1, size // 2), size, 2 * size}))


def _recompute(text: str | None) -> tuple[Recompute, ...] | None:
    if text is None:
        return None
    unknown = set(text.split(",")) - set(RECOMPUTE)
    if unknown:
        raise ValueError(f"--recompute {text}: use {', '.join(RECOMPUTE)}, separated by commas.")
    return tuple(how for how in RECOMPUTE if how in text.split(","))


def _nothing_fits(work: Workload, gpus: int, hardware: Hardware, found: Search) -> str:
    if found.too_large:
        smallest = found.too_large[0]
        told = (
            f"nothing fits {gpus} × {hardware.name} with {hardware.memory_gib:g} GiB: the smallest of "
            f"{len(found.too_large)} layouts needs {smallest.memory.total / GIB:.1f} GiB."
        )
    else:
        reasons = "; ".join(f"{why} ({n})" for why, n in Counter(found.refused).most_common(3))
        told = f"no layout of {gpus} devices is legal: {reasons}."
    near = nearest(work, gpus, hardware)
    if near is None:
        return f"{told} Use a smaller model or larger devices, or another global batch size."
    return (
        f"{told} The nearest that fits: --gpus {near.layout.num_devices} --micro-batch-sizes "
        f"{near.layout.micro_batch_size} --recompute {near.layout.recompute} "
        f"({near.memory.total / GIB:.1f} GiB)."
    )


def _row(plan: Plan) -> dict[str, Any]:
    traffic = {f"{axis} {name}": value for (axis, name), value in sorted(plan.traffic.items())}
    return {
        **asdict(plan.layout),
        "parameters": plan.parameters,
        "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total},
        "sent_bytes": traffic,
        "bubble": plan.bubble,
        "seconds": {**plan.times, "total": plan.seconds},
        "utilization": plan.utilization,
        "kv_bytes_per_sequence": plan.kv_bytes,
    }
