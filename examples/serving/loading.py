"""A model with its tokenizer: from a folder, or a small random one to try things out with.

A folder holds `config.yaml` (a DecoderConfig), `weights.safetensors` or `weights.pt` (a state dict of
MoRTransformer), and `tokenizer.json`. Without a tokenizer a text is its UTF-8 bytes.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_model, save_model

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    MoRTransformer,
    RecursionConfig,
    load_config,
    to_mapping,
)


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

        self._loaded = Loaded.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        return self._loaded.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._loaded.decode(list(ids), skip_special_tokens=False)


@dataclass(frozen=True)
class ServedModel:
    """What there is to serve."""

    name: str
    model: MoRTransformer
    tokenizer: Tokenizer


def load(folder: str | None, seed: int = 0) -> ServedModel:
    """The model of a folder; None: a small one with random weights.

    Raises:
        ValueError: the folder lacks something, or its parts do not fit.
        FileNotFoundError: there is no such folder.
    """
    if folder is None:
        return random_model(seed)
    path = Path(folder)
    config = load_config(DecoderConfig, path / "config.yaml")
    model = MoRTransformer(config)
    _load_weights(model, path)
    tokenizer = path / "tokenizer.json"
    if tokenizer.is_file():
        return ServedModel(path.name, model, FileTokenizer(tokenizer))
    if config.vocab_size < ByteTokenizer.vocab_size:
        raise ValueError(
            f"{folder} has no tokenizer.json, and vocab_size={config.vocab_size} is too small for "
            "bytes. Put its tokenizer there."
        )
    return ServedModel(path.name, model, ByteTokenizer())


def save(model: MoRTransformer, folder: Path, tokenizer: Path | None = None) -> None:
    """Write a folder that `load` reads; an earlier one in its place is replaced when it is whole.

    Args:
        tokenizer: a tokenizer.json to copy.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    OmegaConf.save(to_mapping(model.config), partial / "config.yaml")
    save_model(model, str(partial / "weights.safetensors"))
    if tokenizer is not None:
        shutil.copyfile(tokenizer, partial / "tokenizer.json")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


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


def _load_weights(model: MoRTransformer, path: Path) -> None:
    safe, pickled = path / "weights.safetensors", path / "weights.pt"
    if safe.is_file():
        load_model(model, safe)
    elif pickled.is_file():
        model.load_state_dict(torch.load(pickled, map_location="cpu", weights_only=True))
    else:
        raise ValueError(f"{path} has neither weights.safetensors nor weights.pt.")
