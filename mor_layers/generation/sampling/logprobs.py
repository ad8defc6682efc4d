"""Log-probabilities of tokens, as clients ask for them.

They are those of the model, before temperature, limits, bias and penalties, so that they do not depend
on how tokens are sampled.

Legend: `b` tokens, `v` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Logprobs:
    """The log-probability of a token at its place in a text, and of the most likely tokens there."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with their log-probabilities, best first, as many as requested."""


def logprobs_of(
    logits: Float[Tensor, "b v"], tokens: Sequence[int], counts: Sequence[int]
) -> list[Logprobs]:
    """The log-probability of each token under the logits of its place.

    Args:
        counts: how many of the most likely tokens are reported for each token.
    """
    if not tokens:
        return []
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best, ids = (part.tolist() for part in logprobs.topk(max(counts), dim=-1))
    return [
        Logprobs(token, logprob, tuple(zip(ids[row][:count], best[row][:count], strict=True)))
        for row, (token, logprob, count) in enumerate(zip(tokens, own, counts, strict=True))
    ]
