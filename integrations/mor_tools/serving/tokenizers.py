"""Tokenizers of served models: the file of a model folder, or bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


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

    def as_json(self) -> str:
        """The content of the file."""
        return self._loaded.to_str()

    def encode(self, text: str) -> list[int]:
        # Unlike `encode`, `encode_batch` releases the GIL, so that other threads can run.
        (encoded,) = self._loaded.encode_batch([text], add_special_tokens=False)
        return encoded.ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._loaded.decode(list(ids), skip_special_tokens=False)
