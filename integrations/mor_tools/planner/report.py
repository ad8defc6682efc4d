"""Shows plans as tables and as a figure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mor_layers.costs import ModelShape, count_parameters
from mor_tools.planner.hardware import Hardware
from mor_tools.planner.layouts import Plan, Workload
from mor_tools.planner.search import USABLE, Search, divisors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30
STARVED = 0.7
"""Fraction of the highest possible MFU below which the batch is reported as too small."""
AXES = {"tensor": "TP", "context": "CP", "expert": "EP", "pipeline": "PP", "data": "DP"}


def describe(work: Workload, gpus: int, hardware: Hardware, efficiency: float) -> str:
    """One line about the model, the batch and the hardware."""
    cost, batch = work.cost, work.global_batch_size * work.sequence_length
    return (
        f"{_parameters(work)}, "
        f"{cost.flops_per_token(training=False) / 1e6:.1f} MFLOP/token forward, "
        f"{cost.flops_per_token() / 1e6:.1f} in training; {batch / 1e6:.3g} M tokens per step; "
        f"{gpus} × {hardware.name}: {hardware.tflops:g} TFLOP/s at {efficiency:.0%}, "
        f"{hardware.memory_gib:g} GiB, {hardware.intra_gbps:g} GB/s within a node of "
        f"{hardware.per_node}, {hardware.inter_gbps:g} GB/s between nodes"
    )


def _parameters(work: Workload) -> str:
    """The parameters that are stored and trained, and those of the same depth without sharing."""
    unique = f"{work.cost.parameters.total / 1e6:.1f} M"
    if work.model.recursion is None:
        return f"{unique} parameters"
    plain = count_parameters(ModelShape.from_decoder(replace(work.model, recursion=None)))
    return (
        f"{unique} unique parameters, which are stored and trained ({plain.total / 1e6:.1f} M unrolled: "
        "as many layers without sharing)"
    )


def starvation(
    work: Workload, gpus: int, fitting: Sequence[Plan], efficiency: float, micro_batch_size: int
) -> list[str]:
    """Whether a larger batch or micro-batch would use the devices better, and what to change.

    Args:
        fitting: the layouts that fit, the fastest first.
        micro_batch_size: that of the settings; others were tried as well.
    """
    best, found = fitting[0], []
    if best.utilization < STARVED * efficiency:
        found.append(
            "the batch is too small for these devices: the best layout has an MFU of "
            f"{best.utilization:.1%}, whereas matrix products alone would reach {efficiency:.0%}. "
            f"There are {work.global_batch_size * work.sequence_length / gpus:,.0f} tokens per "
            "device and step. Use a larger training.global_batch_size, or fewer devices."
        )
    same = next((p for p in fitting if p.layout.micro_batch_size == micro_batch_size), None)
    if same is None:
        found.append(
            f"no layout with training.micro_batch_size={micro_batch_size} fits. Set it to "
            f"{best.layout.micro_batch_size}, as in the best layout."
        )
    elif same.utilization < STARVED * best.utilization:
        found.append(
            f"training.micro_batch_size={micro_batch_size} reaches an MFU of at most "
            f"{same.utilization:.1%}, {best.layout.micro_batch_size} reaches "
            f"{best.utilization:.1%}. Set it to {best.layout.micro_batch_size}."
        )
    return found


def name(plan: Plan) -> str:
    """A short name of a layout, such as `TP2 PP4`."""
    layout = plan.layout
    sizes = {"TP": layout.tensor, "PP": layout.pipeline, "CP": layout.context,
             "EP": layout.expert, "DP": layout.data}  # fmt: skip
    text = " ".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "one device"
    return text + (" steps" if layout.pipeline_layout == "steps_as_stages" else "")


def plans_table(plans: Sequence[Plan], count: int) -> Table:
    """Time, memory and traffic of the best layouts, one per row."""
    table = Table(title=f"{len(plans)} best of {count} layouts that fit", box=SIMPLE_HEAD)
    table.caption = (
        "batch: sequences per micro-batch; GiB: on the fullest rank; sent: GB per rank and step"
    )
    table.add_column("layout", no_wrap=True)
    for column in ("batch", "recompute", "seconds", "MFU", "bubble", "GiB", "sent"):
        table.add_column(column, justify="right", no_wrap=True)
    for plan in plans:
        table.add_row(
            name(plan),
            str(plan.layout.micro_batch_size),
            plan.layout.recompute,
            f"{plan.seconds:.3g}",
            f"{plan.utilization:.1%}",
            f"{max(plan.bubble, 0):.1%}",
            f"{plan.memory.total / GIB:.2f}",
            f"{sum(plan.traffic.values()) / 1e9:.3g}",
        )
    return table


def parts_table(plans: Sequence[Plan]) -> Table:
    """Memory of the fullest rank, and traffic of the rank that sends the most, by kind."""
    table = Table(title="Memory (GiB) and traffic of a step (GB), by kind", box=SIMPLE_HEAD)
    table.add_column("layout", no_wrap=True)
    sent = [Counter[str]() for _ in plans]
    for plan, by_axis in zip(plans, sent, strict=True):
        for (axis, _), value in plan.traffic.items():
            by_axis[axis] += value
    axes = [axis for axis in AXES if any(by_axis[axis] for by_axis in sent)]
    for column in ("weights", "grads", "Adam", "kept", *(AXES[axis] for axis in axes)):
        table.add_column(column, justify="right", no_wrap=True)
    for plan, by_axis in zip(plans, sent, strict=True):
        memory = plan.memory
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
        table.add_row(
            name(plan),
            *(f"{part / GIB:.2f}" for part in parts),
            *(f"{by_axis[a] / 1e9:.3g}" if by_axis[a] else "-" for a in axes),
        )
    return table


def refusals(found: Search, hardware: Hardware) -> Table:
    """The number of layouts that are not legal or do not fit, by reason."""
    table = Table(title="Layouts that do not fit", box=SIMPLE_HEAD)
    table.add_column("why")
    table.add_column("layouts", justify="right")
    reasons = Counter(found.refused)
    usable = hardware.memory_gib * USABLE
    reasons[f"memory: above {usable:.1f} GiB, {USABLE:.0%} of a device"] = len(found.too_large)
    reasons = +reasons
    for why, count in reasons.most_common():
        table.add_row(why, str(count))
    return table


def inference_table(work: Workload, gpus: int, hardware: Hardware) -> Table:
    """The number of whole sequences whose keys and values fit into memory with the weights."""
    weights = work.cost.parameters.total * work.itemsize
    title = f"Generation, sequences of {work.sequence_length} tokens"
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in ("TP", "copies", "weights, GiB", "KV of one, MiB", "fit a copy",
                   "fit in all"):  # fmt: skip
        table.add_column(column, justify="right")
    for size in divisors(gcd(gpus, work.model.kv_heads), work.model.kv_heads):
        room = hardware.memory_gib * GIB * USABLE - weights / size
        one = work.kv_bytes / work.split_caches(size)
        fitting = max(0, int(room // one))
        table.add_row(
            str(size), str(gpus // size), f"{weights / size / GIB:.2f}", f"{one / 2**20:.2f}",
            str(fitting), str(fitting * (gpus // size)),
        )  # fmt: skip
    return table


def draw(plans: Sequence[Plan], hardware: Hardware) -> "Figure":
    """A figure with one bar for the memory and one for the time of each plan."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 1.6 + 0.42 * len(plans)), sharey=True, layout="constrained"
    )
    names = [f"{name(p)}, batch {p.layout.micro_batch_size}" for p in plans]
    memory = {
        "weights": [p.memory.weights / GIB for p in plans],
        "gradients": [p.memory.gradients / GIB for p in plans],
        "optimizer": [p.memory.optimizer / GIB for p in plans],
        "activations": [p.memory.activations / GIB for p in plans],
    }
    times = {part: [p.times[part] for p in plans] for part in plans[0].times}
    for axes, parts, colors, label in (
        (left, memory, "tab:blue tab:cyan tab:olive tab:orange",
         f"GiB on the fullest rank, of {hardware.memory_gib:g}"),
        (right, times, "tab:blue tab:red tab:gray tab:cyan", "seconds of a step"),
    ):  # fmt: skip
        begin = [0.0] * len(plans)
        for (part, values), color in zip(parts.items(), colors.split(), strict=True):
            axes.barh(range(len(plans)), values, left=begin, label=part, color=color)
            begin = [a + b for a, b in zip(begin, values, strict=True)]
        axes.set_xlabel(label)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    left.set_yticks(range(len(plans)), names)
    left.invert_yaxis()
    return figure
