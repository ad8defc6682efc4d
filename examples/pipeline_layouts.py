"""Compare two ways to put a recursion on a pipeline, and draw the schedule of one of them.

    python examples/pipeline_layouts.py --gpus 2048 --stages 8 --picture schedule.png

A block can lie in one stage with all its steps, or its layers are spread over all stages and every
step is a virtual stage (`mor_megatron.recursion_pipeline_spec`). Memory, bubble and traffic are
counted from the settings, on any number of GPUs, without one. Times are FLOPs at one speed:
communication, and kernels that are slower on fewer tokens, come on top.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mor_layers import DecoderConfig, ExpertChoice, FixedDepth, RecursionConfig, TokenChoice
from mor_tools.planner import PipelineAccount, PipelinePlan, pipeline_account

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GB = 1e9


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        model, accounts = count(options)
    except ValueError as error:
        parser().error(str(error))
    console = Console()
    console.print(describe(model, options))
    console.print(layouts(accounts))
    chosen = accounts[-1]
    console.print(stages(chosen))
    if options.picture:
        draw(chosen, options.steps).savefig(options.picture, dpi=150)
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
    machine.add_argument("--gpus", type=int, default=2048)
    machine.add_argument("--stages", type=int, default=8, help="pipeline stages for virtual stages")
    machine.add_argument("--tensor-parallel", type=int, default=8)
    machine.add_argument("--sequence-length", type=int, default=8192)
    machine.add_argument("--global-batch", type=int, default=1024, help="sequences per step")
    machine.add_argument("--microbatch-size", type=int, default=1)
    machine.add_argument("--recompute", action="store_true", help="keep only what enters a chunk")
    parser.add_argument("--picture", type=Path, help="a .png or .svg file to draw the schedule in")
    return parser


def count(options: argparse.Namespace) -> tuple[DecoderConfig, list[PipelineAccount]]:
    """The layouts that fit, steps as virtual stages last.

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
    tokens = None
    if options.router == "token_choice":  # as its balancing aims at: equally many exit at each step
        length, steps = options.sequence_length, options.steps
        tokens = tuple(length * (steps - r) / steps for r in range(steps))
    accounts = []
    for layout, size in (("one_stage", 1), ("one_stage", 2), ("steps_as_stages", options.stages)):
        ranks = options.tensor_parallel * size
        replicas = options.gpus // ranks
        batch = options.microbatch_size * max(1, replicas)
        if options.gpus % ranks or options.global_batch % batch:
            if layout == "one_stage":
                continue
            raise ValueError(
                f"--gpus {options.gpus} must be a multiple of {ranks} (stages times tensor "
                f"parallel), and --global-batch {options.global_batch} of {batch} (replicas times "
                "microbatch size)."
            )
        plan = PipelinePlan(
            layout,  # type: ignore[arg-type]
            stages=size,
            num_microbatches=options.global_batch // batch,
            microbatch_size=options.microbatch_size,
            tensor_parallel=options.tensor_parallel,
            data_parallel=replicas,
            recompute=options.recompute,
        )
        accounts.append(pipeline_account(model, plan, options.sequence_length, tokens))
    return model, accounts


def describe(model: DecoderConfig, options: argparse.Namespace) -> str:
    """The model and the machine in a sentence."""
    return (
        f"{options.block_size} shared layers × {options.steps} steps + prelude + coda, "
        f"h={model.hidden_size}, {options.router}, {options.kv_policy}; {options.gpus} GPUs, "
        f"{options.global_batch} sequences of {options.sequence_length} per optimizer step"
    )


def layouts(accounts: list[PipelineAccount]) -> Table:
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
        "sent per GPU\n(GB)",
    ):
        table.add_column(name, justify="right")
    for result in accounts:
        plan = result.plan
        fullest = max(result.stages, key=lambda stage: stage.memory_bytes)
        table.add_row(
            plan.layout,
            str(plan.stages),
            str(plan.data_parallel),
            str(plan.num_microbatches),
            f"{max(stage.parameters for stage in result.stages) / 1e6:.0f}",
            f"{fullest.memory_bytes / GB:.1f}",
            f"{fullest.activation_bytes / GB:.1f}",
            f"{result.bubble:.1%}",
            f"{result.time_per_sequence / accounts[0].time_per_sequence:.2f}",
            str(result.carried_rows) if plan.stages > 1 else "-",
            f"{max(stage.sent_bytes for stage in result.stages) / GB:.1f}",
        )
    table.caption = (
        "time: of an optimizer step, relative to the first row; sent: per optimizer step"
    )
    return table


def stages(account: PipelineAccount) -> Table:
    """Memory of each stage's GPUs."""
    table = Table(title=f"Memory per GPU, {account.plan.layout} (GB)")
    for name in ("stage", "weights", "gradients", "optimizer", "activations", "sum", "idle"):
        table.add_column(name, justify="right")
    for number, stage in enumerate(account.stages):
        parts = (
            stage.weight_bytes,
            stage.gradient_bytes,
            stage.optimizer_bytes,
            stage.activation_bytes,
            stage.memory_bytes,
        )
        idle = 1 - stage.busy / account.makespan
        table.add_row(str(number), *(f"{part / GB:.2f}" for part in parts), f"{idle:.1%}")
    return table


def draw(account: PipelineAccount, steps: int) -> "Figure":
    """A row per stage, a box per pass: colour is the step, light boxes are backward passes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps
    from matplotlib import pyplot as plt
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    plan = account.plan
    colors = colormaps["viridis"].resampled(steps + 1)
    boxes, faces = [], []
    for run in account.passes:
        left, right = run.start / account.makespan, run.end / account.makespan
        top, bottom = run.stage - 0.45, run.stage + 0.45
        boxes.append([(left, top), (right, top), (right, bottom), (left, bottom)])
        faces.append((*colors(run.chunk)[:3], 0.95 if run.is_forward else 0.4))
    figure, axes = plt.subplots(figsize=(14, 1.6 + 0.34 * plan.stages), layout="constrained")
    edge = "white" if len(boxes) < 2500 else "none"
    axes.add_collection(PolyCollection(boxes, facecolors=faces, edgecolors=edge, linewidths=0.3))
    if len(boxes) < 700:
        for run in account.passes:
            middle = (run.start + run.end) / 2 / account.makespan
            if run.end - run.start > 0.006 * account.makespan:
                axes.text(middle, run.stage, run.microbatch, ha="center", va="center", fontsize=6)
    axes.set(
        xlim=(0, 1),
        ylim=(plan.stages - 0.5, -0.5),
        xlabel="time of an optimizer step",
        ylabel="pipeline stage",
        title=f"{plan.num_gpus} GPUs: {plan.stages} stages of {plan.tensor_parallel} "
        f"tensor-parallel ranks, {plan.data_parallel} replicas alike; "
        f"{plan.num_microbatches} microbatches, bubble {account.bubble:.1%}",
    )
    axes.set_yticks(range(0, plan.stages, max(1, plan.stages // 16)))
    chunks = 1 + max(run.chunk for run in account.passes)
    axes.legend(
        handles=[Patch(color=colors(v), label=f"step {v + 1}") for v in range(chunks)]
        + [Patch(color="grey", alpha=0.4, label="backward")],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    return figure


if __name__ == "__main__":
    main()
