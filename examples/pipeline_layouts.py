"""Compare two ways to put a recursion on a pipeline, and draw the schedule of one of them.

    python examples/pipeline_layouts.py --gpus 2048 --stages 8 --picture schedule.png

A block can lie in one stage with all its steps, or its layers are spread over all stages and every
step is a virtual stage (`mor_megatron.recursion_pipeline_spec`). Memory, bubble and traffic are
those of `mor plan`, counted from the settings: no GPU is needed. Kernels that are slower on fewer
tokens are not counted.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mor_layers import DecoderConfig, ExpertChoice, FixedDepth, RecursionConfig, TokenChoice
from mor_tools.planner import (
    HARDWARE,
    Hardware,
    Layout,
    PipelineLayout,
    Plan,
    Workload,
    carried_rows,
    evaluate,
    refusal,
    timeline,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GB = 1e9


@dataclass(frozen=True)
class Comparison:
    """The same training step in several layouts."""

    work: Workload
    hardware: Hardware
    plans: list[Plan]
    """Steps as virtual stages last."""


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        compared = count(options)
    except ValueError as error:
        parser().error(str(error))
    console = Console()
    console.print(describe(compared.work.model, options))
    console.print(layouts(compared))
    console.print(stages(compared.plans[-1]))
    if options.picture:
        draw(compared, options.steps).savefig(options.picture, dpi=150)
        console.print(f"The schedule is drawn in {options.picture}.")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    model = parser.add_argument_group("model (middle-cycle recursion, Llama layout)")
    model.add_argument("--hidden-size", type=int, default=8192)
    model.add_argument("--ffn-hidden-size", type=int, default=28672)
    model.add_argument("--heads", type=int, default=64)
    model.add_argument("--kv-heads", type=int, default=8)
    model.add_argument("--vocab-size", type=int, default=128256)
    model.add_argument("--block-size", type=int, default=48, help="layers of the shared block (K)")
    model.add_argument("--steps", type=int, default=3, help="times the block runs (N_r)")
    model.add_argument(
        "--router",
        choices=["expert_choice", "token_choice", "fixed_depth"],
        default="expert_choice",
    )
    model.add_argument("--kv-policy", default="recursion_wise")
    machine = parser.add_argument_group("machine and batch")
    machine.add_argument("--hardware", choices=sorted(HARDWARE), default="h100")
    machine.add_argument("--gpus", type=int, default=2048)
    machine.add_argument("--stages", type=int, default=8, help="pipeline stages for virtual stages")
    machine.add_argument("--tensor-parallel", type=int, default=8)
    machine.add_argument("--sequence-length", type=int, default=8192)
    machine.add_argument("--global-batch", type=int, default=1024, help="sequences per step")
    machine.add_argument("--microbatch-size", type=int, default=1)
    machine.add_argument("--recompute", action="store_true", help="keep only what enters layers")
    parser.add_argument("--picture", type=Path, help="a .png or .svg file to draw the schedule in")
    return parser


def count(options: argparse.Namespace) -> Comparison:
    """The layouts that are legal.

    Raises:
        ValueError: settings that do not fit together.
    """
    routers = {
        "expert_choice": ExpertChoice(),
        "token_choice": TokenChoice(),
        "fixed_depth": FixedDepth(),
    }
    recursion = RecursionConfig(
        options.steps, router=routers[options.router], kv_policy=options.kv_policy
    )
    model = DecoderConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        ffn_hidden_size=options.ffn_hidden_size,
        num_unrolled_layers=options.block_size * options.steps + 2,
        num_heads=options.heads,
        num_kv_heads=options.kv_heads,
        recursion=recursion,
    )
    work = Workload(
        model, options.sequence_length, options.global_batch, distributed_optimizer=True
    )
    hardware, plans = HARDWARE[options.hardware], []
    sizes: list[tuple[PipelineLayout, int]] = [
        ("one_stage", 1),
        ("one_stage", 2),
        ("steps_as_stages", options.stages),
    ]
    for kind, size in sizes:
        ranks = options.tensor_parallel * size
        layout = Layout(
            tensor=options.tensor_parallel,
            pipeline=size,
            pipeline_layout=kind,
            data=max(1, options.gpus // ranks),
            micro_batch_size=options.microbatch_size,
            recompute="full" if options.recompute else "none",
            sequence_parallel=options.tensor_parallel > 1,
        )
        reason = refusal(work, layout)
        if reason is None and layout.num_devices == options.gpus:
            plans.append(evaluate(work, layout, hardware))
        elif kind == "steps_as_stages":
            raise ValueError(
                f"--stages {size} cannot be used ({reason or 'devices are left over'}). --gpus "
                f"{options.gpus} must be a multiple of {ranks} (stages times tensor parallel), "
                f"--global-batch {options.global_batch} of "
                f"{layout.data * layout.micro_batch_size * size} (replicas times microbatch size "
                f"times stages), and --block-size {options.block_size} of {size}."
            )
    return Comparison(work, hardware, plans)


def describe(model: DecoderConfig, options: argparse.Namespace) -> str:
    """The model and the machine in a sentence."""
    return (
        f"{options.block_size} shared layers × {options.steps} steps + prelude + coda, "
        f"h={model.hidden_size}, {options.router}, {options.kv_policy}; {options.gpus} GPUs, "
        f"{options.global_batch} sequences of {options.sequence_length} per optimizer step"
    )


def layouts(compared: Comparison) -> Table:
    """One row per layout; memory is that of the fullest GPU."""
    table = Table(title="Layouts")
    table.add_column("layout", no_wrap=True)
    for name in (
        "stages",
        "replicas",
        "micro-\nbatches",
        "parameters\nper GPU (M)",
        "memory\n(GB)",
        "of it acti-\nvations (GB)",
        "bubble",
        "time",
        "rows sent",
        "sent to stages\nper GPU (GB)",
    ):
        table.add_column(name, justify="right")
    for plan in compared.plans:
        layout, is_piped = plan.layout, plan.layout.pipeline > 1
        table.add_row(
            layout.pipeline_layout,
            str(layout.pipeline),
            str(layout.data),
            str(microbatches(compared.work, layout)),
            f"{max(stage.parameters for stage in plan.stages) / 1e6:.0f}",
            f"{plan.memory.total / GB:.1f}",
            f"{plan.memory.activations / GB:.1f}",
            f"{plan.bubble:.1%}",
            f"{plan.seconds / compared.plans[0].seconds:.2f}",
            str(carried_rows(compared.work, layout)) if is_piped else "-",
            f"{max(stage.traffic['pipeline', 'send'] for stage in plan.stages) / GB:.1f}",
        )
    table.caption = (
        "time: of an optimizer step, relative to the first row; sent: per optimizer step"
    )
    return table


def microbatches(work: Workload, layout: Layout) -> int:
    """Microbatches of each pipeline per optimizer step."""
    return work.global_batch_size // (layout.data * layout.micro_batch_size)


def stages(plan: Plan) -> Table:
    """Memory of each stage's GPUs."""
    table = Table(title=f"Memory per GPU, {plan.layout.pipeline_layout} (GB)")
    for name in ("stage", "weights", "gradients", "optimizer", "activations", "sum", "idle"):
        table.add_column(name, justify="right")
    for number, stage in enumerate(plan.stages):
        memory = stage.memory
        parts = (
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.activations,
            memory.total,
        )
        idle = 1 - stage.busy / plan.makespan
        table.add_row(str(number), *(f"{part / GB:.2f}" for part in parts), f"{idle:.1%}")
    return table


def draw(compared: Comparison, steps: int) -> "Figure":
    """A row per stage, a box per pass: colour is the step, light boxes are backward passes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps
    from matplotlib import pyplot as plt
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    plan = compared.plans[-1]
    layout, passes = plan.layout, timeline(compared.work, plan.layout, compared.hardware)
    makespan = max(run.end for run in passes)
    colors = colormaps["viridis"].resampled(steps + 1)
    boxes, faces = [], []
    for run in passes:
        left, right = run.start / makespan, run.end / makespan
        top, bottom = run.stage - 0.45, run.stage + 0.45
        boxes.append([(left, top), (right, top), (right, bottom), (left, bottom)])
        faces.append((*colors(run.chunk)[:3], 0.95 if run.is_forward else 0.4))
    figure, axes = plt.subplots(figsize=(14, 1.6 + 0.34 * layout.pipeline), layout="constrained")
    edge = "white" if len(boxes) < 2500 else "none"
    axes.add_collection(PolyCollection(boxes, facecolors=faces, edgecolors=edge, linewidths=0.3))
    if len(boxes) < 700:
        for run in passes:
            middle = (run.start + run.end) / 2 / makespan
            if run.end - run.start > 0.006 * makespan:
                axes.text(middle, run.stage, run.microbatch, ha="center", va="center", fontsize=6)
    axes.set(
        xlim=(0, 1),
        ylim=(layout.pipeline - 0.5, -0.5),
        xlabel="time of an optimizer step",
        ylabel="pipeline stage",
        title=f"{layout.num_devices} GPUs: {layout.pipeline} stages of {layout.tensor} "
        f"tensor-parallel ranks, {layout.data} replicas alike; "
        f"{microbatches(compared.work, layout)} microbatches, bubble {plan.bubble:.1%}",
    )
    axes.set_yticks(range(0, layout.pipeline, max(1, layout.pipeline // 16)))
    chunks = 1 + max(run.chunk for run in passes)
    axes.legend(
        handles=[Patch(color=colors(v), label=f"step {v + 1}") for v in range(chunks)]
        + [Patch(color="grey", alpha=0.4, label="backward")],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    return figure


if __name__ == "__main__":
    main()
