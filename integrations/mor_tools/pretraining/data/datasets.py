"""Training and held-out samples from Megatron-Core's datasets, in an order that survives restarts.

The text of a step depends only on the step's number, the seed and the settings of the data: neither
on the number of processes nor on how often the run was stopped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor
from torch.utils.data import DataLoader

from mor_dali import BatchOrder, MegatronSamples, Prefetch, token_batches
from mor_tools.pretraining.data.text import PreparedText, TextTokenizer
from mor_tools.pretraining.settings import Settings

ENTROPY_SAMPLE = 20_000_000
"""Largest number of held-out tokens from which the unigram entropy is computed."""


@dataclass(frozen=True)
class Datasets:
    """The two splits of the text."""

    train: GPTDataset
    """Samples for every step of the whole run; `PackedDocuments` if attention is reset between
    documents."""
    held_out: GPTDataset
    """Samples of the held-out documents: the global batches of one validation loss."""


class PackedDocuments(GPTDataset):
    """A GPTDataset whose samples also number their documents: `documents` `[s]`, from 0.

    The end-of-document token belongs to the document that it ends, as in Megatron. Positions
    continue from document to document, which changes nothing because rotary positions are relative.
    """

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        sample = super().__getitem__(idx)
        is_end = (sample["tokens"] == self.config.tokenizer.eod).long()  # type: ignore[union-attr]
        return sample | {"documents": is_end.cumsum(0) - is_end}


def build_datasets(settings: Settings, text: PreparedText, tokenizer: TextTokenizer) -> Datasets:
    """Build both splits. Every process must call it.

    Raises:
        ValueError: a split is too short for one sample.
    """
    _check_lengths(settings, text)
    share, batch = settings.data.held_out_share, settings.training.global_batch_size
    config = GPTDatasetConfig(
        random_seed=settings.training.seed,
        sequence_length=settings.data.sequence_length,
        blend=([str(text.prefix)], None),
        split=f"{1 - share},{share},0",
        path_to_cache=str(Path(settings.output) / "sample-order"),
        tokenizer=tokenizer,  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,  # masks would cost `s` numbers per token to build and send
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [settings.training.steps * batch, settings.evaluation.batches * batch, 0]
    kind = PackedDocuments if settings.data.reset_attention_mask else GPTDataset
    train, held_out, _ = BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, config).build()
    return Datasets(train, held_out)


def order_after_extension(train: GPTDataset, settings: Settings, planned_steps: int) -> str | None:
    """A warning if a run with more steps than planned reads its text in another order, else None.

    Megatron shuffles all epochs of a run together, so the order depends on the number of epochs.
    """
    lengths = train.dataset.sequence_lengths  # type: ignore[union-attr]
    tokens = int(lengths[train.indices].sum())
    per_step = settings.training.global_batch_size * settings.data.sequence_length
    planned, now = (-(-n * per_step // tokens) for n in (planned_steps, settings.training.steps))
    if planned == now:
        return None
    return (
        f"warning: {settings.training.steps} steps read the text {now} times instead of the "
        f"{planned_steps} planned before, which changes its order: some of it is read again "
        "earlier than in a run that was planned longer from the start."
    )


def batches(
    dataset: GPTDataset, settings: Settings, first_step: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Yield this process's micro-batches, starting with the first one of `first_step` (0-based)."""
    order = BatchOrder(
        end=len(dataset),
        size=settings.training.micro_batch_size,
        first=first_step * settings.training.global_batch_size,
        rank=parallel_state.get_data_parallel_rank(),
        ranks=parallel_state.get_data_parallel_world_size(),
    )
    if settings.data.loader == "dali":
        return _dali_batches(dataset, settings, order)
    workers = settings.data.workers
    return iter(
        DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )
    )


def unigram_entropy(dataset: GPTDataset, vocab_size: int) -> float:
    """Entropy in nats of the token frequencies in a dataset's documents.

    No model that ignores a token's context can have a lower loss on these documents.

    Raises:
        ValueError: a token id is not in the vocabulary.
    """
    counts = numpy.zeros(vocab_size, dtype=numpy.int64)
    for document in dataset.indices:
        ids = dataset.dataset[int(document)]
        if ids.max(initial=0) >= vocab_size:
            raise ValueError(
                f"token id {ids.max()} in the data is outside the tokenizer's vocabulary of "
                f"{vocab_size} tokens. Set data.tokenizer to the one that the data was written "
                "with."
            )
        counts += numpy.bincount(ids, minlength=vocab_size)
        if counts.sum() >= ENTROPY_SAMPLE:
            break
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * numpy.log(shares)).sum())


def _dali_batches(
    dataset: GPTDataset, settings: Settings, order: BatchOrder
) -> Iterator[dict[str, Tensor]]:
    samples = MegatronSamples(dataset, numbers_documents=isinstance(dataset, PackedDocuments))
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    return token_batches(samples, order, Prefetch(device, workers=settings.data.workers))


def _check_lengths(settings: Settings, text: PreparedText) -> None:
    dataset = IndexedDataset(str(text.prefix))  # its arrays are mapped only while it lives
    lengths = dataset.sequence_lengths
    split = round((1 - settings.data.held_out_share) * len(lengths))
    needed = settings.data.sequence_length + 1
    for name, tokens in (("training", lengths[:split]), ("held-out", lengths[split:])):
        if tokens.sum() < needed:
            raise ValueError(
                f"the {name} split has {tokens.sum()} tokens in {len(tokens)} documents, but one "
                f"sample needs {needed}. Use more text, or change "
                f"data.held_out_share={settings.data.held_out_share} or "
                f"data.sequence_length={settings.data.sequence_length}."
            )
