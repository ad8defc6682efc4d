"""A model with its tokenizer: from a folder, or a small random one to try things out with.

The folder is one of `mor_layers.weights.folder`. Without a tokenizer.json a text is its UTF-8 bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mor_layers import DecoderConfig, ExpertChoice, MoRTransformer, RecursionConfig, load_model


class Tokenizer(Protocol):
    """From text to ids and back."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """A token is a byte."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i % 256 for i in ids).decode("utf-8", errors="replace")


class FileTokenizer:
    """A tokenizer.json of the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Loaded

        try:
            self._loaded = Loaded.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"{path} is no tokenizer: {str(error)[:200]}. Put its own there."
            ) from error

    def encode(self, text: str) -> list[int]:
        # Unlike `encode`, this lets other threads run meanwhile.
        (encoded,) = self._loaded.encode_batch([text], add_special_tokens=False)
        return encoded.ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._loaded.decode(list(ids), skip_special_tokens=False)


@dataclass(frozen=True)
class ServedModel:
    """What there is to serve."""

    name: str
    model: MoRTransformer
    tokenizer: Tokenizer


def load(folder: str | None, seed: int = 0, trust_remote_code: bool = False) -> ServedModel:
    """The model of a folder; None: a small one with random weights.

    Args:
        trust_remote_code: as of `load_model`.

    Raises:
        ValueError: the folder lacks something, or its parts do not fit.
        FileNotFoundError: there is no such folder.
    """
    if folder is None:
        return random_model(seed)
    path = Path(folder)
    model = load_model(path, trust_remote_code)
    tokenizer = path / "tokenizer.json"
    if tokenizer.is_file():
        return ServedModel(path.name, model, FileTokenizer(tokenizer))
    if model.config.vocab_size < ByteTokenizer.vocab_size:
        raise ValueError(
            f"{folder} has no tokenizer.json, and vocab_size={model.config.vocab_size} is too small for "
            "bytes. Put its tokenizer there."
        )
    return ServedModel(path.name, model, ByteTokenizer())


def random_model(seed: int = 0) -> ServedModel:
    """A small model over bytes that has learnt nothing."""
    torch.manual_seed(seed)
    recursion = RecursionConfig(3, "middle_cycle", ExpertChoice(), "recursion_wise")
    config = DecoderConfig(256, 64, 128, 8, 4, 2, recursion=recursion)
    model = MoRTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # unit gain, so that depths and tokens vary
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return ServedModel("random", model, ByteTokenizer())
