"""Random pieces of the text that ships with Python, and a training step on some, for small experiments.

Legend: `b` pieces, `s` length.
"""

import torch
from jaxtyping import Int
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mor_layers import MoRTransformer
from mor_layers.models import DecoderOutput
from mor_tools.pretraining.data.text import prepare
from mor_tools.pretraining.settings import DataSettings


class TextPieces:
    """Token ids of the prepared text.

    Args:
        vocabulary: entries of the tokenizer, which is trained on it.
        length: tokens of a piece that are inputs (`s`).
    """

    def __init__(self, vocabulary: int, length: int) -> None:
        settings = DataSettings(vocabulary_size=vocabulary, sequence_length=length)
        dataset = IndexedDataset(str(prepare(settings).prefix))
        documents = [torch.from_numpy(dataset[i].astype("int64")) for i in range(len(dataset))]
        cut = round(len(documents) * (1 - settings.held_out_share))
        self.training, self.held_out = torch.cat(documents[:cut]), torch.cat(documents[cut:])
        self.length = length

    def sample(
        self, ids: Int[Tensor, " n"], count: int, generator: torch.Generator
    ) -> Int[Tensor, "b s+1"]:
        """Pieces of `ids`, inputs with the label of the last."""
        starts = torch.randint(len(ids) - self.length, (count,), generator=generator)
        return torch.stack([ids[start : start + self.length + 1] for start in starts.tolist()])


def training_step(
    model: MoRTransformer, optimizer: Optimizer, schedule: LRScheduler, ids: Int[Tensor, "b s+1"]
) -> DecoderOutput:
    """Learn from some pieces, with gradients clipped to a norm of 1."""
    output = model(ids[:, :-1], labels=ids[:, 1:])
    optimizer.zero_grad()
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    model.advance([output])
    return output
