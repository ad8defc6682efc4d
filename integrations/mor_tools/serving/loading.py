"""Loads a model with its tokenizer from a folder, or makes a small random model to experiment with.

The folder has the format of `mor_layers.weights.folder`. If it has no tokenizer.json, tokens are the
UTF-8 bytes of a text.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mor_layers import DecoderConfig, ExpertChoice, MoRTransformer, RecursionConfig, load_model
from mor_layers.weights import read_json
from mor_layers.weights.folder import open_model
from mor_tools.serving.calls.chat_template import ChatTemplate, read_chat_template
from mor_tools.serving.calls.grammars import Grammars
from mor_tools.serving.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A model to serve, with its name and tokenizer."""

    name: str
    config: DecoderConfig
    make: Callable[[], MoRTransformer]
    """Loads its weights. In a server of several processes, the one that listens needs none."""
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a text."""
    chat_template: ChatTemplate | None = None
    """How conversations are written as text, if the folder says it."""

    @functools.cached_property
    def model(self) -> MoRTransformer:
        """The model, loaded when it is first asked for."""
        return self.make()

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Makes constraints for texts that must follow a grammar."""
        return Grammars(self.tokenizer, self.config.vocab_size, self.stop_ids)


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
    config = open_model(path, trust_remote_code).config
    make = functools.partial(load_model, path, trust_remote_code)
    template, stop_ids = read_chat_template(path), _stop_ids(path, config.vocab_size)
    file = path / "tokenizer.json"
    tokenizer = FileTokenizer(file) if file.is_file() else ByteTokenizer()
    if isinstance(tokenizer, ByteTokenizer) and config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"{folder} has no tokenizer.json, and vocab_size={config.vocab_size} is too small for "
            "bytes. Copy the model's tokenizer.json into the folder."
        )
    return ServedModel(path.name, config, make, tokenizer, stop_ids, template)


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
    recursion = RecursionConfig(3, "middle_cycle", ExpertChoice(), "recursion_wise")
    config = DecoderConfig(256, 64, 128, 8, 4, 2, recursion=recursion)
    return ServedModel(
        "random", config, functools.partial(_random_weights, config, seed), ByteTokenizer()
    )


def _random_weights(config: DecoderConfig, seed: int) -> MoRTransformer:
    torch.manual_seed(seed)
    model = MoRTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # unit gain, so that depths and generated tokens vary
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model
