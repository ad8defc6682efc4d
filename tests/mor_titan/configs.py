"""Configurations for the tests, with batches that do not depend on the number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset
from torchtitan.trainer import Trainer

from mor_titan import config_registry
from tests.mor_titan.decoders import DECODERS


class _Rows(IterableDataset):
    """Every n-th row of the text, beginning with this rank's."""

    def __init__(self, rank: int, num_ranks: int, tokenizer: Any, seq_len: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.text = HuggingFaceTextDataset("python_topics", None, tokenizer, seq_len)

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.text), self.rank, None, self.num_ranks)


class RowLoader(ParallelAwareDataloader):
    """Deals the rows of a batch out to the ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        """Nothing to set."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: Any,
        seq_len: int,
        local_batch_size: int,
        **unused: Any,
    ) -> None:
        rows = _Rows(dp_rank, dp_world_size, tokenizer, seq_len)
        sizes = {"dp_rank": dp_rank, "dp_world_size": dp_world_size}
        super().__init__(rows, **sizes, batch_size=local_batch_size)


def expert_choice() -> Trainer.Config:
    """The model of `mor_debugmodel`."""
    return _config("expert_choice")


def experts() -> Trainer.Config:
    """Experts, loss-free biases over depths and over experts, and tied embeddings."""
    return _config("experts")


def _config(name: str) -> Trainer.Config:
    spec = config_registry.model_registry(name, DECODERS[name])
    config = config_registry.mor_debugmodel()
    return replace(config, model_spec=spec, dataloader=RowLoader.Config())
