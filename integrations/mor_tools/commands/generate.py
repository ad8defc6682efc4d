"""Continue a text and show how deep each token was computed, in colour.

    mor generate "Once upon a time" --model runs/exported --max-new-tokens 60

Without --model a small model with random weights babbles. With --calibrate FILE the thresholds are set
from the text of a file first; --dial then turns compute down or up without training, with --extra-steps
beyond the depth that the model was trained with.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from mor_layers.generation import (
    CacheSettings,
    DepthBatchingEngine,
    Request,
    Sampling,
    calibrate,
    deepened,
)
from mor_tools.serving.loading import ServedModel, load

COLOURS = ("bright_black", "blue", "cyan", "green", "yellow", "red", "magenta")
"""By steps; deeper ones share the last."""


class GenerationError(Exception):
    """The model cannot continue the text."""


def style(depth: int) -> str:
    """Colour of a token that took so many steps."""
    return COLOURS[min(depth, len(COLOURS) - 1)]


def generate(served: ServedModel, options: argparse.Namespace, console: Console) -> None:
    """Prompt and continuation, token by token as they come, and a summary.

    Raises:
        ValueError: the text cannot be continued with these options.
        GenerationError: not with this model.
    """
    decode = served.tokenizer.decode
    ids = tuple(served.tokenizer.encode(options.prompt))
    request = Request(
        ids,
        options.max_new_tokens,
        Sampling(options.temperature, options.top_k, options.top_p, options.seed),
        stop=tuple(options.stop),
    )
    settings = CacheSettings.for_all_steps(
        served.model, len(ids) + options.max_new_tokens, is_int8=options.int8_kv
    )
    engine = DepthBatchingEngine(served.model, settings, decode=decode)
    depths: list[int] = []
    began = time.perf_counter()
    for event in engine.stream(request):
        if event.prompt_depths:
            for token, depth in zip(ids, event.prompt_depths, strict=True):
                console.print(Text(decode([token]), style=f"{style(depth)} italic"), end="")
        if event.depth is not None:
            depths.append(event.depth)
        console.print(Text(event.text, style=style(event.depth or 0)), end="")
        if event.finish_reason == "error":
            raise GenerationError(event.error)
    seconds = time.perf_counter() - began
    legend = Text("\n\nsteps: ")
    for depth in range(max(depths) + 1):
        share = depths.count(depth) / len(depths)
        legend.append(f" {depth} ({share:.0%}) ", style=f"reverse {style(depth)}")
    mean = sum(depths) / len(depths)
    legend.append(f"  mean {mean:.2f}, {len(depths) / seconds:.1f} tokens/s")
    console.print(legend)


def run(options: argparse.Namespace) -> None:
    """Generate; exits with 1 where the model cannot continue the text.

    Raises:
        ValueError: an option is not allowed, or the model folder lacks something.
        OSError: a file is missing.
    """
    console = Console(soft_wrap=True, highlight=False)
    if options.dial != 1.0 and options.calibrate is None:
        raise ValueError("--dial needs held-out text to set thresholds from: --calibrate FILE.")
    served = load(options.model, trust_remote_code=options.trust_remote_code)
    if options.extra_steps:
        served = replace(served, model=deepened(served.model, options.extra_steps))
    if options.calibrate is not None:
        ids = served.tokenizer.encode(Path(options.calibrate).read_text("utf-8"))
        pieces = [torch.tensor(p)[None] for p in _pieces(ids, 256)][:64]
        reached = calibrate(served.model, pieces, options.dial)
        console.print(f"mean depth on {options.calibrate}: {reached.mean_depth:.2f}")
    try:
        generate(served, options, console)
    except GenerationError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _pieces(ids: list[int], length: int) -> list[list[int]]:
    return [ids[i : i + length] for i in range(0, len(ids), length)]
