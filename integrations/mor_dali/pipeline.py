"""Makes batches from samples in DALI, with labels, masks and positions, on a CPU or a GPU.

Batches are prefetched while the model trains.

Legend: `b` batch, `s` sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy

from mor_dali.order import BatchOrder
from mor_dali.samples import Ids, TokenSamples, document_numbers, document_starts

if TYPE_CHECKING:  # processes that only read samples should not import torch
    from torch import Tensor

INSTALL = (
    "NVIDIA DALI is not installed. Install mor-layers[dali] (nvidia-dali-cuda130, for Linux; it also "
    "runs on CPUs), or use Megatron's own data loader."
)


@dataclass(frozen=True)
class Prefetch:
    """Where batches are made, and how many in advance.

    Raises:
        ValueError: a number is out of range.
    """

    device_id: int | None = None
    """GPU that makes the batches. None: the CPU."""
    batches: int = 2
    """Number of batches made in advance. At least 1."""
    threads: int = 1
    """Number of threads of DALI. At least 1."""
    workers: int = 0
    """Number of processes that read token ids. 0: the training process reads them."""

    def __post_init__(self) -> None:
        for name, minimum in (("batches", 1), ("threads", 1), ("workers", 0)):
            value = getattr(self, name)
            if value < minimum:
                raise ValueError(f"Prefetch: {name}={value} must be at least {minimum}.")


def is_installed() -> bool:
    """Whether DALI can be imported."""
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is no package `nvidia` at all
        return False


def token_batches(
    samples: TokenSamples, order: BatchOrder, prefetch: Prefetch | None = None
) -> Iterator[dict[str, Tensor]]:
    """Batches of `samples` in the given order.

    Returns:
        Batches with `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (fp32), each `[b s]`.
        Depending on `samples.fields`, also `documents` `[b s]` and `attention_mask` `[b 1 s s]`.

    Raises:
        ImportError: DALI is not installed.
        ValueError: the order has more samples than there are.
    """
    if not is_installed():
        raise ImportError(INSTALL)
    if order.end > len(samples):
        raise ValueError(
            f"BatchOrder: end={order.end} is beyond the {len(samples)} samples. "
            f"Use end={len(samples)} or less."
        )
    if len(order) == 0:
        return iter(())
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    pipeline, names = _pipeline(samples, order, prefetch or Prefetch())
    iterator = DALIGenericIterator(pipeline, names, auto_reset=False)
    return (batch for (batch,) in iterator)


class _Source:
    """For the number of a DALI iteration, the token ids `[b s+1]` and the documents of a batch.

    Documents are found in NumPy, because this depends on the values of the tokens.
    """

    def __init__(self, samples: TokenSamples, order: BatchOrder) -> None:
        self.samples, self.order = samples, order

    def __call__(self, index: int) -> tuple[list[Ids], ...]:
        if index >= len(self.order):
            raise StopIteration
        fields, end = self.samples.fields, self.samples.fields.end_of_document
        texts = [self.samples[number] for number in self.order[index]]
        found = [texts]
        if fields.needs_starts:
            found.append([document_starts(text[:-1], end) for text in texts])
        if fields.numbers_documents:
            # As in the batches of GPTDataset, padding has become token 0 at this point.
            mapped = (numpy.where(text == fields.padding, 0, text) for text in texts)
            found.append([document_numbers(text[:-1], end) for text in mapped])
        return tuple(found)


def _pipeline(
    samples: TokenSamples, order: BatchOrder, prefetch: Prefetch
) -> tuple[Any, list[str]]:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    number = 1 + samples.fields.needs_starts + samples.fields.numbers_documents
    is_parallel = prefetch.workers > 0
    pipeline = Pipeline(
        batch_size=order.size,
        num_threads=prefetch.threads,
        device_id=prefetch.device_id,
        prefetch_queue_depth=prefetch.batches,
        py_num_workers=max(1, prefetch.workers),
        py_start_method="spawn",  # CUDA cannot be used in a forked process
    )
    with pipeline:
        read = fn.external_source(
            _Source(samples, order),
            num_outputs=number,
            batch=True,
            parallel=is_parallel,
            prefetch_queue_depth=max(prefetch.batches, prefetch.workers) if is_parallel else None,
            dtype=[types.INT64] * number,
            ndim=[1] * number,
        )
        if prefetch.device_id is not None:
            read = [node.gpu() for node in read]
        outputs = _fields(samples, read, "cpu" if prefetch.device_id is None else "gpu")
        pipeline.set_outputs(*outputs.values())
    return pipeline, list(outputs)


def _fields(samples: TokenSamples, read: list[Any], device: str) -> dict[str, Any]:
    """The DALI graph that computes the fields. Its nodes are single samples, without `b`."""
    from nvidia.dali import fn, types

    fields, length = samples.fields, samples.sequence_length
    text, others = read[0], iter(read[1:])
    starts = next(others) if fields.needs_starts else None
    ids = text * fn.cast(text != fields.padding, dtype=types.INT64)
    loss_mask = fn.cast(text[1:] != fields.padding, dtype=types.FLOAT)  # [s+1] -> [s]
    if fields.masks_ends:
        loss_mask *= fn.cast(text[:-1] != fields.end_of_document, dtype=types.FLOAT)
    places = fn.constant(
        idata=list(range(length)), shape=[length], dtype=types.INT64, device=device
    )
    outputs = {
        "tokens": ids[:-1],
        "labels": ids[1:],
        "loss_mask": loss_mask,
        "position_ids": places - starts if fields.resets_positions else places,
    }
    if fields.numbers_documents:
        outputs["documents"] = next(others)
    if fields.attention_mask != "none":
        queries = fn.reshape(places, shape=[1, length, 1])
        keys = fn.reshape(places, shape=[1, 1, length])
        barred = keys > queries  # [1 s s]
        if fields.attention_mask == "documents":
            barred = barred | (keys < fn.reshape(starts, shape=[1, length, 1]))
        outputs["attention_mask"] = barred
    return outputs
