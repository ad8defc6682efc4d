"""Multi-token prediction: heads that predict further tokens from the state that predicts the next one.

Head j combines the state of token i with the embedding of token i + j, runs a layer, and predicts token
i + j + 1 with the model's own output matrix. Its result is the state that the next head starts from. The
heads make training denser, and draft tokens for speculative decoding; plain inference leaves them out.

Source: DeepSeek-V3 (arXiv 2412.19437, section 2.2), with the losses and the order of Megatron-Core.

Legend: `s` sequence, `b` batch, `h` hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mor_layers.models.config import DecoderConfig
from mor_layers.models.layers import DecoderStack, StepNorm
from mor_layers.recursion import ExpertUse, StepContext
from mor_layers.selection import Tokens


class PredictionHead(nn.Module):
    """One head: two norms, a projection, a decoder layer and a last norm.

    Args:
        config: settings of a plain decoder, for its layer.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        size = config.hidden_size
        norms = [StepNorm(size, config.rms_norm_epsilon) for _ in range(3)]
        self.embedding_norm, self.state_norm, self.norm = norms
        self.projection = nn.Linear(2 * size, size, bias=False)
        self.layers = DecoderStack(config, 1)

    def forward(
        self,
        states: Float[Tensor, "s b h"],
        embedded: Float[Tensor, "s b h"],
        context: StepContext,
    ) -> Float[Tensor, "s b h"]:
        """From the states of tokens, and the embeddings of the last tokens that the head may know of,
        to states after the last norm."""
        joined = torch.cat([self.embedding_norm(embedded), self.state_norm(states)], dim=-1)
        return self.norm(self.layers(self.projection(joined), context))


class HeadLosses(NamedTuple):
    """What training the heads gave."""

    loss: Float[Tensor, ""]
    """Mean over heads of the cross entropy of each, in nats per token."""
    expert_use: tuple[dict[int, ExpertUse], ...]
    """Of each head."""


def head_losses(
    heads: Sequence[PredictionHead],
    embedding: nn.Module,
    output: nn.Module,
    states: Float[Tensor, "s b h"],
    ids: Int[Tensor, "s b"],
    labels: Int[Tensor, "s b"],
    tokens: Tokens,
) -> HeadLosses:
    """Run all heads on a whole sequence, and compare them with the labels.

    A token whose label lies beyond the sequence, or in another document, does not count.

    Args:
        states: after the model's last norm.
        labels: the token after each one; negative to ignore a position.
    """
    losses, uses = [], []
    for distance, head in enumerate(heads, start=1):
        context = StepContext(0, tokens)
        states = head(states, embedding(_later(ids, distance, 0)), context)
        targets = _later(labels, distance, -1)
        if tokens.documents is not None:
            is_other = _later(tokens.documents, distance, -1) != tokens.documents
            targets = targets.masked_fill(is_other, -1)
        logits, flat = output(states).flatten(0, 1).float(), targets.clamp(min=-1).flatten()
        total = F.cross_entropy(logits, flat, ignore_index=-1, reduction="sum")
        losses.append(total / (flat >= 0).sum().clamp(min=1))
        uses.append(context.expert_use)
    return HeadLosses(torch.stack(losses).mean(), tuple(uses))


def _later(values: Int[Tensor, "s b"], distance: int, beyond: int) -> Int[Tensor, "s b"]:
    """The value of the token so many places later; `beyond` where there is none."""
    return F.pad(values[distance:], (0, 0, 0, min(distance, len(values))), value=beyond)
