"""Loads a model with its tokenizer from a folder, or makes a small random model to experiment with.

The folder has the format of `mor_layers.weights.folder`. If it has no tokenizer.json, tokens are the
UTF-8 bytes of a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mor_layers import DecoderConfig, ExpertChoice, MoRTransformer, RecursionConfig, load_model
from mor_layers.weights import read_json
from mor_tools.serving.chat_template import ChatTemplate, read_chat_template


class Tokenizer(Protocol):
    """Converts text to token ids and back."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """Tokens are the UTF-8 bytes of a text."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i % 256 for i in ids).decode("utf-8", errors="replace")


class FileTokenizer:
    """A tokenizer from a tokenizer.json of the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Loaded

        try:
            self._loaded = Loaded.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(
                f"{path} is not a tokenizer: {str(error)[:200]}. Replace it by the model's own."
            ) from error

    def encode(self, text: str) -> list[int]:
        # Unlike `encode`, `encode_batch` releases the GIL, so that other threads can run.
        (encoded,) = self._loaded.encode_batch([text], add_special_tokens=False)
        return encoded.ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._loaded.decode(list(ids), skip_special_tokens=False)


@dataclass(frozen=True)
class ServedModel:
    """A model to serve, with its name and tokenizer."""

    name: str
    model: MoRTransformer
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a text."""
    chat_template: ChatTemplate | None = None
    """How conversations are written as text, if the folder says it."""


def load(folder: str | None, seed: int = 0, trust_remote_code: bool = False) -> ServedModel:
    """Load a model from a folder.

    Args:
        folder: the folder. None: make a small model with random weights.
        seed: seed of the random weights.
        trust_remote_code: as for `load_model`.

    Raises:
        ValueError: a file is missing, or the files do not fit together.
        FileNotFoundError: the folder does not exist.
    """
    if folder is None:
        return random_model(seed)
    path = Path(folder)
    model = load_model(path, trust_remote_code)
    template, stop_ids = read_chat_template(path), _stop_ids(path, model.config.vocab_size)
    tokenizer = path / "tokenizer.json"
    if tokenizer.is_file():
        return ServedModel(path.name, model, FileTokenizer(tokenizer), stop_ids, template)
    if model.config.vocab_size < ByteTokenizer.vocab_size:
        raise ValueError(
            f"{folder} has no tokenizer.json, and vocab_size={model.config.vocab_size} is too small "
            "for bytes. Copy the model's tokenizer.json into the folder."
        )
    return ServedModel(path.name, model, ByteTokenizer(), stop_ids, template)


def _stop_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a text, from generation_config.json or else from config.json."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
                raise ValueError(
                    f"{folder / name}: eos_token_id={str(value)[:80]} must be a token id in "
                    f"0..{vocab_size - 1}, or a list of them."
                )
            if ids:
                return tuple(ids)
    return ()


def random_model(seed: int = 0) -> ServedModel:
    """A small untrained model with bytes as tokens."""
    torch.manual_seed(seed)
    recursion = RecursionConfig(3, "middle_cycle", ExpertChoice(), "recursion_wise")
    config = DecoderConfig(256, 64, 128, 8, 4, 2, recursion=recursion)
    model = MoRTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # unit gain, so that depths and generated tokens vary
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return ServedModel("random", model, ByteTokenizer())
