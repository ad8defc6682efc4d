"""Derives what a plan needs to know from the settings of a pretraining run."""

import json
from pathlib import Path

from mor_tools.planner import Workload
from mor_tools.pretraining.models.decoder import decoder_config, padded_vocabulary
from mor_tools.pretraining.settings import DataSettings, Settings


def workload(settings: Settings, vocab_size: int | None = None) -> Workload:
    """The model and its training, independent of the layout.

    Args:
        vocab_size: replaces the size of the tokenizer or of the file's vocabulary.

    Raises:
        ValueError: a teacher runs next to the model, or the tokenizer's size cannot be read.
    """
    if settings.is_distilled:
        raise ValueError(
            "uptrain runs a teacher next to the model, which a plan does not count. Plan without "
            "it (--set uptrain=null), and leave room for its weights and forward pass."
        )
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"--vocab-size {vocab_size} must be at least 1.")
    size = padded_vocabulary(settings, vocab_size or _vocabulary(settings.data))
    return Workload(
        decoder_config(settings, size),
        settings.data.sequence_length,
        settings.training.global_batch_size,
        settings.training.precision == "bf16",
        settings.parallel.distributed_optimizer,
        documents=True,  # as pretraining builds its stages
    )


def _vocabulary(data: DataSettings) -> int:
    if data.tokenizer is None:
        return data.vocabulary_size
    try:
        stored = json.loads(Path(data.tokenizer).read_text("utf-8"))
        ids = [*stored["model"]["vocab"].values(), *(t["id"] for t in stored["added_tokens"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the size of data.tokenizer={data.tokenizer} cannot be read ({error!r}). Give "
            "--vocab-size."
        ) from error
    return max(ids) + 1
