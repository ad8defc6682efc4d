"""Profile training steps of a small recursion, and draw where the time of a forward pass goes.

    python examples/profile_step.py --trace trace.json --picture trace.svg

The trace can be opened in https://ui.perfetto.dev. The picture has the ranges that the recursion names:
a row for the steps, and one for their parts.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile, schedule

from mor_layers import DecoderConfig, ExpertChoice, MoRTransformer, RecursionConfig

COLORS = {
    "mor/route": "#b35400",
    "mor/select": "#6b7078",
    "mor/block": "#21608f",
    "mor/combine": "#a03b7c",
    "mor/write back": "#3a7d44",
}


def profiled(hidden_size: int, length: int) -> profile:
    """Several training steps, after two in which the profiler and the caches warm up."""
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    recursion = RecursionConfig(3, router=ExpertChoice())
    config = DecoderConfig(256, hidden_size, 5 * hidden_size // 2, 8, 4, recursion=recursion)
    model = MoRTransformer(config).to("cuda" if on_gpu else "cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=activities, schedule=schedule(wait=1, warmup=1, active=10)) as run:
        for _ in range(12):
            ids = torch.randint(256, (4, length + 1), device=model.embedding.weight.device)
            model(ids[:, :-1], labels=ids[:, 1:]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    return run


def picture(run: profile) -> Figure:
    """The ranges of the fastest forward pass on a line of time: the one that was least disturbed."""
    events = sorted(
        (event for event in run.events() or () if event.name.startswith("mor/")),
        key=lambda event: event.time_range.start,
    )
    starts = [i for i, event in enumerate(events) if event.name == "mor/step 1"]
    passes = [events[i:j] for i, j in zip(starts, [*starts[1:], len(events)], strict=True)]
    events = min(passes, key=lambda ranges: ranges[-1].time_range.end - ranges[0].time_range.start)
    begin = events[0].time_range.start
    figure = Figure((8.5, 2.1), layout="constrained")
    axes = figure.subplots()
    for event in events:
        start, length = event.time_range.start - begin, event.time_range.elapsed_us()
        is_step = event.name.startswith("mor/step")
        color = "#c9d3de" if is_step else COLORS[event.name]
        axes.barh(0 if is_step else 1, length / 1000, left=start / 1000, color=color, height=0.8)
        if is_step:
            axes.text((start + length / 2) / 1000, 0, event.name, ha="center", va="center")
    for name, color in COLORS.items():
        axes.barh(1, 0, color=color, label=name)
    axes.set(xlabel="milliseconds", yticks=[], ylim=(1.5, -0.5))
    axes.spines[["top", "left", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (256)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence (256)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the trace there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the ranges there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    run = profiled(options.hidden, options.length)
    ours = [row for row in run.key_averages() if row.key.startswith("mor/")]
    for row in sorted(ours, key=lambda row: -row.cpu_time_total):
        mean = row.cpu_time_total / row.count / 1000
        print(f"{row.key:15} {row.count:3} × {mean:7.2f} ms")
    if options.trace:
        run.export_chrome_trace(str(options.trace))
    if options.picture:
        picture(run).savefig(options.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
