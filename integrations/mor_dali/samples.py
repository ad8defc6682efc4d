"""Sources of token ids: Megatron's .bin/.idx pairs in the order of a GPTDataset, or .npy shards.

A sample is `[s+1]` token ids. The first `s` are the inputs, and the last `s` are the labels.

Legend: `s` sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy
from numpy.typing import NDArray

Ids = NDArray[numpy.int64]
AttentionMask = Literal["none", "causal", "documents"]


@dataclass(frozen=True)
class BatchFields:
    """The contents of a batch in addition to tokens, labels, loss mask and position ids."""

    padding: int = -1
    """Id of padding. It is replaced by token 0 and excluded from the loss."""
    end_of_document: int | None = None
    """Id of the token that ends a document and is part of it. Required by the fields below that
    depend on documents."""
    masks_ends: bool = False
    """Whether the prediction of the token after the end of a document is excluded from the loss."""
    resets_positions: bool = False
    """Whether position ids start at 0 in each document."""
    attention_mask: AttentionMask = "none"
    """Mask `[b 1 s s]`, True where attention is not allowed. `causal`: to later tokens. `documents`:
    to later tokens and to other documents. `none`: no mask."""
    numbers_documents: bool = False
    """Whether batches have `documents` `[b s]`, the number of each token's document, from 0."""

    def __post_init__(self) -> None:
        if self.needs_ends and self.end_of_document is None:
            raise ValueError(
                f"{self} depends on documents. Pass end_of_document, the id that ends them."
            )

    @property
    def needs_starts(self) -> bool:
        """Whether a field depends on where documents start."""
        return self.resets_positions or self.attention_mask == "documents"

    @property
    def needs_ends(self) -> bool:
        """Whether a field depends on `end_of_document`."""
        return self.needs_starts or self.masks_ends or self.numbers_documents


class TokenSamples(Protocol):
    """Samples by number. They must be picklable, so that other processes can read them."""

    @property
    def fields(self) -> BatchFields: ...
    @property
    def sequence_length(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Ids: ...  # [s+1]


class MegatronSamples:
    """The samples of a Megatron-Core GPTDataset, with the same boundaries and in the same order.

    Args:
        dataset: a GPTDataset. Its indices determine the parts of documents in each sample. The ids
            are read from its .bin file.
        numbers_documents: see `BatchFields`.

    Raises:
        ValueError: a setting of the dataset's configuration is not supported.
    """

    def __init__(self, dataset: Any, numbers_documents: bool = False) -> None:
        config = dataset.config
        if getattr(config, "inter_document_masking", False):
            raise ValueError(
                "GPTDatasetConfig.inter_document_masking=True makes cu_seqlens, which DALI batches "
                "do not support. Set it to False. reset_attention_mask also separates documents."
            )
        if not config.add_extra_token_to_sequence:
            raise ValueError(
                "GPTDatasetConfig.add_extra_token_to_sequence=False leaves no label for a sample's "
                "last token. Set it to True."
            )
        if dataset.shuffle_index is None:  # some configurations load it with the first sample
            dataset[0]
        mask: AttentionMask = "documents" if config.reset_attention_mask else "causal"
        self.fields = BatchFields(
            padding=dataset._pad_token_id,
            end_of_document=config.tokenizer.eod,
            masks_ends=config.eod_mask_loss,
            resets_positions=config.reset_position_ids,
            attention_mask=mask if config.create_attention_mask else "none",
            numbers_documents=numbers_documents,
        )
        self.sequence_length: int = config.sequence_length
        self._tokens = dataset.dataset
        self._documents = dataset.document_index
        self._bounds = dataset.sample_index
        self._order: NDArray[Any] = dataset.shuffle_index

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, number: int) -> Ids:
        sample = self._order[number]
        (first, begin), (last, end) = (
            self._bounds[sample].tolist(),
            self._bounds[sample + 1].tolist(),
        )
        ids = numpy.full(self.sequence_length + 1, self.fields.padding, dtype=numpy.int64)
        filled = 0
        for place in range(first, last + 1):
            offset = begin if place == first else 0
            length = end + 1 - offset if place == last else None
            part = self._tokens.get(int(self._documents[place]), offset=offset, length=length)
            ids[filled : filled + len(part)] = part
            filled += len(part)
        return ids

    def __getstate__(self) -> dict[str, Any]:
        """Replace memory-mapped indices by file names, so that pickling does not copy them."""
        return {name: _FileName.of(value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(
            {k: v.open() if isinstance(v, _FileName) else v for k, v in state.items()}
        )


class NumpyShards:
    """Samples of .npy files with one row of token ids each, in a random order.

    Each shard is cut into samples of `sequence_length` tokens. The rest at its end is not read.

    Args:
        paths: the files. The order of samples depends on the order of the files.
        sequence_length: number of tokens per sample (s).
        seed: seed of the order.
        fields: see `BatchFields`.

    Raises:
        ValueError: a file is not one row of integers, or none is long enough for a sample.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        sequence_length: int,
        seed: int,
        fields: BatchFields | None = None,
    ) -> None:
        self.fields = fields or BatchFields()
        self.sequence_length = sequence_length
        self._paths = [str(path) for path in paths]
        self._shards = [self._open(path) for path in self._paths]
        counts = [max(0, len(shard) - 1) // sequence_length for shard in self._shards]
        self._ends = numpy.cumsum(counts, dtype=numpy.int64)
        if sum(counts) == 0:
            raise ValueError(
                f"none of {self._paths} has the {sequence_length + 1} tokens of one sample. Use more "
                f"text, or a sequence_length shorter than {sequence_length}."
            )
        self._order = numpy.random.default_rng(seed).permutation(sum(counts))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: int) -> Ids:
        place = self._order[number]
        shard = int(numpy.searchsorted(self._ends, place, side="right"))
        place -= self._ends[shard - 1] if shard else 0
        begin = int(place) * self.sequence_length
        return self._shards[shard][begin : begin + self.sequence_length + 1].astype(numpy.int64)

    @staticmethod
    def _open(path: str) -> NDArray[Any]:
        ids = numpy.load(path, mmap_mode="r")
        if ids.ndim != 1 or not numpy.issubdtype(ids.dtype, numpy.integer):
            raise ValueError(
                f"{path} holds {ids.dtype} of shape {ids.shape}. A shard must be one row of integers."
            )
        return ids

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_shards": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _shards=[self._open(path) for path in state["_paths"]])


def document_numbers(tokens: Ids, end_of_document: int) -> Ids:
    """The number of each token's document within the sample, from 0: `[s]` → `[s]`."""
    is_end = (tokens == end_of_document).astype(numpy.int64)
    return is_end.cumsum() - is_end


def document_starts(tokens: Ids, end_of_document: int) -> Ids:
    """The position where each token's document starts, 0 for the first one: `[s]` → `[s]`."""
    starts = numpy.zeros_like(tokens)
    (ends,) = numpy.nonzero(tokens[:-1] == end_of_document)
    starts[ends + 1] = ends + 1
    return numpy.maximum.accumulate(starts)


@dataclass(frozen=True)
class _FileName:
    """Replaces a memory-mapped .npy file in a pickle."""

    path: str

    @classmethod
    def of(cls, value: Any) -> Any:
        return cls(str(value.filename)) if isinstance(value, numpy.memmap) else value

    def open(self) -> NDArray[Any]:
        return numpy.load(self.path, mmap_mode="r", allow_pickle=False)
