"""Initial weights from a model in any format, such as a Megatron checkpoint in any layout."""

import json
from pathlib import Path

from torch import nn

from mor_layers import DecoderConfig
from mor_megatron.checkpoints import load_tensors, megatron_view, runs
from mor_tools.formats import RUN_CHECKPOINTS, RUN_CLAIM, RUN_MODEL, opened

_SAME = (
    "vocab_size",
    "hidden_size",
    "num_unrolled_layers",
    "num_heads",
    "kv_heads",
    "head_size",
    "qkv_bias",
    "qk_norm",
    "rms_norm_epsilon",
    "rope_base",
    "rope_scaling",
    "latent_attention",
    "tie_embeddings",
)
"""Fields that must be equal. Other sizes show up in the shapes of tensors, and the routing may
change."""


def branch(folder: Path, tokenizer: Path) -> str | None:
    """A note for a run that starts from another run's weights; None for any other model.

    Raises:
        ValueError: the other run used another tokenizer.
    """
    if not (folder / RUN_CLAIM).is_file():
        return None
    theirs = _tokenizer_of(folder)
    if theirs is not None and theirs.read_bytes() != tokenizer.read_bytes():
        raise ValueError(
            f"training.initial_weights={folder} is a run with another tokenizer, whose token ids "
            f"stand for other pieces of text. Add data.tokenizer={theirs}."
        )
    step = runs.latest_step(folder / RUN_CHECKPOINTS)
    return (
        f"a branch of {folder}: its weights after step {step}, with a new optimizer and the "
        "schedule from the beginning"
    )


def _tokenizer_of(folder: Path) -> Path | None:
    """The tokenizer of a run, if its file still exists."""
    text = Path(json.loads((folder / RUN_CLAIM).read_text("utf-8"))["text"])
    places = (folder / RUN_MODEL / "tokenizer.json", text.with_name("tokenizer.json"))
    return next((place for place in places if place.is_file()), None)


def load(folder: Path, chunks: list[nn.Module], decoder: DecoderConfig) -> None:
    """Load a folder's weights into this process's part of the model. Every process must call it.

    Only one tensor at a time is held in memory beside the model.

    Raises:
        ValueError: the folder contains no model, or the model is damaged or does not match the
            settings.
        FileNotFoundError: the folder or a part of the model does not exist.
    """
    stored = opened(folder)
    differences = [
        f"{name} is {getattr(stored.config, name)} there, {getattr(decoder, name)} here"
        for name in _SAME
        if getattr(stored.config, name) != getattr(decoder, name)
    ]
    if differences:
        raise ValueError(
            f"training.initial_weights={folder} holds another model: {'; '.join(differences)}. "
            "Change the settings under model., or data.tokenizer if the vocabulary differs."
        )
    load_tensors(chunks, megatron_view(stored.weights, decoder))
