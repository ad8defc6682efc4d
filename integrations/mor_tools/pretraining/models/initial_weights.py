"""Weights to start from: a model in any format, such as a Megatron checkpoint of any layout."""

from pathlib import Path

from torch import nn

from mor_layers import DecoderConfig
from mor_megatron.checkpoints import load_tensors, megatron_view
from mor_tools.formats import opened

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
    "tie_embeddings",
)
"""What must be equal; other sizes show in shapes, and how tokens are routed may change."""


def load(folder: Path, chunks: list[nn.Module], decoder: DecoderConfig) -> None:
    """Put a folder's weights into this process's part of the model. Every process calls it.

    One tensor at a time is in memory beside the model.

    Raises:
        ValueError: there is no model in the folder, it is damaged, or it is another one.
        FileNotFoundError: there is no such folder, or a part is missing.
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
            "Change the settings under model., or data.tokenizer where the vocabulary differs."
        )
    load_tensors(chunks, megatron_view(stored.weights, decoder))
