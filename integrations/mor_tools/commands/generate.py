"""Continue a text and show how deep each token was computed, in colour.

    mor generate "Once upon a time" --model runs/exported --max-new-tokens 60

Without --model, a small model with random weights generates noise. With --calibrate FILE,
thresholds are first set from the text of a file; --dial then lowers or raises compute without
training, and --extra-steps allows steps beyond the depth that the model was trained with.
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
from mor_tools import terminal
from mor_tools.serving.loading import ServedModel, load

COLOURS = ("bright_black", "blue", "cyan", "green", "yellow", "red", "magenta")
"""Colours by step; deeper steps share the last one."""


class GenerationError(Exception):
    """The model failed to continue the text."""


def style(depth: int) -> str:
    """Colour of a token that took `depth` steps."""
    return COLOURS[min(depth, len(COLOURS) - 1)]


def generate(served: ServedModel, options: argparse.Namespace, console: Console) -> None:
    """Print the prompt and its continuation token by token as they are generated, and a summary.

    Raises:
        ValueError: the text cannot be continued with these options.
        GenerationError: the model failed.
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
        served.model,
        len(ids) + options.max_new_tokens,
        is_int8=options.int8_kv,
        is_fp8=options.fp8_kv,
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
    """Generate; exits with code 1 if the model fails to continue the text.

    Raises:
        ValueError: an option is not allowed, or the model folder is incomplete.
        OSError: a file does not exist.
    """
    console = Console(soft_wrap=True, highlight=False)
    if options.dial != 1.0 and options.calibrate is None:
        raise ValueError(
            "--dial needs held-out text from which thresholds are set: --calibrate FILE."
        )
    with terminal.working(f"loading {options.model or 'a random model'}"):
        served = load(options.model, trust_remote_code=options.trust_remote_code)
    if options.extra_steps:
        deeper = deepened(served.model, options.extra_steps)
        served = replace(served, config=deeper.config, make=lambda: deeper)
    if options.calibrate is not None:
        ids = served.tokenizer.encode(Path(options.calibrate).read_text("utf-8"))
        pieces = [torch.tensor(p)[None] for p in _pieces(ids, 256)][:64]
        with terminal.working(f"calibrating on {options.calibrate}"):
            reached = calibrate(served.model, pieces, options.dial)
        console.print(f"mean depth on {options.calibrate}: {reached.mean_depth:.2f}")
    try:
        generate(served, options, console)
    except GenerationError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _pieces(ids: list[int], length: int) -> list[list[int]]:
    return [ids[i : i + length] for i in range(0, len(ids), length)]
