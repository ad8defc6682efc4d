"""Show what a model does with a text, token by token, on one HTML page.

    mor inspect runs/tiny --text notes.txt
    mor inspect runs/tiny/model --text notes.txt --output page.html --tensorboard runs/tiny/looks

The page shows how deep each token goes and how surprising it is, the router's scores, and which
experts work at which step. A run's folder adds the training's history.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from mor_layers import load_model
from mor_layers.inspection import Inspection, inspect_text
from mor_tools import terminal
from mor_tools.formats import model_folder, trained_length

DEFAULT_WINDOW = 1024
"""Tokens per window if the folder does not say with which length the model was trained."""


@dataclass(frozen=True)
class _Tokenized:
    """A text and its tokens."""

    ids: torch.Tensor
    """Token ids, `[t]`."""
    texts: list[str]
    """The text of each token."""


def run(options: argparse.Namespace) -> None:
    """Inspect a model.

    Raises:
        ValueError: the folder has no model, the text does not fit it, or an option has no effect.
        OSError: a file does not exist or cannot be written.
    """
    from mor_tools.reports.inspection_page import render  # matplotlib takes a second to load
    from mor_tools.reports.rows import read_rows

    if options.wandb_offline and options.wandb is None:
        raise ValueError("--wandb-offline has no effect without --wandb PROJECT. Leave it out.")
    folder = model_folder(options.checkpoint)
    text = options.text.read_text("utf-8")
    with terminal.working(f"loading {folder}"):
        model = load_model(folder, options.trust_remote_code)
    tokens = _tokenize(folder, text, model.config.vocab_size)
    if len(tokens.ids) < 2:
        raise ValueError(
            f"{options.text} has {len(tokens.ids)} tokens. Use a text with at least 2."
        )
    window = options.window or trained_length(folder) or DEFAULT_WINDOW
    with terminal.working(f"reading {len(tokens.ids):,} tokens of {options.text}"):
        seen = inspect_text(model, tokens.ids, window)
    rows = read_rows(options.checkpoint / "history.jsonl")
    with terminal.working("drawing the page"):
        page = render(seen, tokens.texts, f"{options.checkpoint} reads {options.text.name}", rows)
    output = options.output or options.checkpoint / "inspection.html"
    output.write_text(page, "utf-8")
    _track(options, seen, output.parent, rows[-1].step if rows else 0)
    Console().print(f"wrote {output}", highlight=False, markup=False, soft_wrap=True)


def _tokenize(folder: Path, text: str, vocab_size: int) -> _Tokenized:
    """Tokenize with the folder's tokenizer.json; without one, each byte is a token."""
    path = folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(
                f"{path} is not a tokenizer: {str(error)[:200]}. Replace it by the model's own."
            ) from error
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        texts = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        return _Tokenized(torch.tensor(ids, dtype=torch.long), texts)
    if vocab_size < 256:
        raise ValueError(
            f"{folder} has no tokenizer.json, and vocab_size={vocab_size} is too small for bytes. "
            "Put the model's tokenizer there."
        )
    raw = text.encode()
    texts = [bytes([byte]).decode("utf-8", "replace") for byte in raw]
    return _Tokenized(torch.tensor(list(raw), dtype=torch.long), texts)


def _track(options: argparse.Namespace, seen: Inspection, folder: Path, step: int) -> None:
    from mor_tools.reports.inspection_figures import figures
    from mor_tools.reports.inspection_page import scalars
    from mor_tools.reports.raster import pixels
    from mor_tools.reports.trackers import TensorBoard, Tracker, Wandb

    trackers: list[Tracker] = []
    if options.tensorboard is not None:
        trackers.append(TensorBoard(options.tensorboard))
    if options.wandb is not None:
        mode = "offline" if options.wandb_offline else "online"
        name = f"inspect {options.checkpoint.name}"
        trackers.append(Wandb(options.wandb, folder / "wandb-inspection", mode, name))
    if not trackers:
        return
    drawn = {n: pixels(figure, seen.num_recursions) for n, figure in figures(seen).items()}
    histograms = _histograms(seen)
    for tracker in trackers:
        tracker.scalars(scalars(seen), step)
        tracker.images({f"inspect/{name}": image for name, image in drawn.items()}, step)
        tracker.histograms(histograms, step)
        tracker.close()


def _histograms(seen: Inspection) -> dict[str, torch.Tensor]:
    found: Sequence[tuple[str, torch.Tensor]] = [
        ("inspect/depth", seen.depths.float()),
        ("inspect/surprise", seen.surprise[1:]),
        *((f"inspect/step_{r}/score", scores) for r, scores in enumerate(seen.scores, start=1)),
    ]
    return {name: values[~values.isnan()] for name, values in found if not values.isnan().all()}
