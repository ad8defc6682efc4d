"""The text of a run."""

from dataclasses import dataclass
from typing import Literal

import mor_dali
from mor_layers.models import MOST_TOKENS
from mor_tools.pretraining.settings.rules import (
    require,
    require_at_least,
    require_at_most,
    require_share,
)

Loader = Literal["megatron", "dali"]
MOST_WORKERS = 256
"""Each is a process beside every process that trains."""


@dataclass(frozen=True)
class DataSettings:
    """The text, and how it becomes token ids."""

    path: str | None = None
    """A text file, a folder of .txt files, a .jsonl file with a `text` field a line, or the prefix
    of an existing .bin/.idx pair. null: the documentation and source code that ship with Python."""
    tokenizer: str | None = None
    """A tokenizer.json of the `tokenizers` library. null: a byte-level BPE is trained on the text,
    which an existing .bin/.idx pair does not have."""
    vocabulary_size: int = 4096
    """Size of the BPE that is trained. At least 257: the bytes and the end of a document."""
    end_of_document: str = "<|endoftext|>"
    """Token between documents; `tokenizer` must have it."""
    sequence_length: int = 256
    """Tokens in a training sequence, of as many documents as it takes. At least 2."""
    reset_attention_mask: bool = True
    """Whether a token attends and is routed within its own document alone. False: across those
    before it in the sequence too."""
    held_out_share: float = 0.05
    """Share of the documents kept for validation. In (0, 1)."""
    prepared_folder: str = "runs/prepared-text"
    """Where token ids and tokenizers are kept for later runs."""
    workers: int = 0
    """Processes that read ahead. 0: the training process reads."""
    loader: Loader = "megatron"
    """What makes batches: `megatron`, its dataset's samples collated by PyTorch, or `dali`, the same
    batches through NVIDIA DALI, made ahead on the GPU where there is one."""

    def __post_init__(self) -> None:
        owner = "data"
        require(
            self.loader != "dali" or mor_dali.is_installed(),
            f"{owner}.loader='dali': {mor_dali.INSTALL} That is {owner}.loader=megatron.",
        )
        require_at_least(0, owner, workers=self.workers)
        require_at_most(MOST_WORKERS, owner, workers=self.workers)
        require_at_least(2, owner, sequence_length=self.sequence_length)
        require_at_least(257, owner, vocabulary_size=self.vocabulary_size)
        require_at_most(MOST_TOKENS, owner, vocabulary_size=self.vocabulary_size)
        for name in ("path", "tokenizer", "end_of_document", "prepared_folder"):
            require(
                getattr(self, name) != "",
                f"{owner}.{name} is empty. Name one, or leave it out for the default.",
            )
        require_share(owner, held_out_share=self.held_out_share)
