"""The text of a run."""

from dataclasses import dataclass
from typing import Literal

from mor_layers.models import MOST_TOKENS
from mor_tools.pretraining.settings.rules import (
    require,
    require_at_least,
    require_at_most,
    require_share,
)

Loader = Literal["megatron", "dali"]
MOST_WORKERS = 256
"""The upper limit of `workers`: each is a process beside every training process."""


@dataclass(frozen=True)
class DataSettings:
    """The text, and how it becomes token ids."""

    path: str | None = None
    """A text file, a folder of .txt files, a .jsonl file with a `text` field per line, or the
    prefix of an existing .bin/.idx pair. null: the documentation that ships with Python, and those
    of its source files that contain much explanation."""
    tokenizer: str | None = None
    """A tokenizer.json of the `tokenizers` library. null: a byte-level BPE is trained on the text; this
    is not possible with a .bin/.idx pair."""
    vocabulary_size: int = 4096
    """Vocabulary size of the BPE that is trained. At least 257: the bytes and the end of a document."""
    end_of_document: str = "<|endoftext|>"
    """Token between documents; `tokenizer` must have it."""
    sequence_length: int = 256
    """Tokens in a training sequence, which may contain several documents. At least 2."""
    reset_attention_mask: bool = True
    """Whether tokens attend and are routed only within their own document. False: also across earlier
    documents of the sequence."""
    held_out_share: float = 0.05
    """Share of the documents kept for validation. In (0, 1)."""
    prepared_folder: str = "runs/prepared-text"
    """Folder in which token ids and tokenizers are kept for later runs."""
    workers: int = 0
    """Number of processes that read ahead. 0: the training process reads."""
    loader: Loader = "megatron"
    """What makes the batches: `megatron` (samples of its dataset, collated by PyTorch) or `dali` (the
    same batches through NVIDIA DALI, prefetched to the GPU if there is one)."""

    def __post_init__(self) -> None:
        owner = "data"
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
