"""Changes the logits of a request by its own settings and text: logit bias, and penalties.

The order is that of vLLM: the bias first, then the penalties, then temperature and limits
(`draws`).

Legend: `b` requests, `v` vocabulary.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mor_layers.generation.sampling.draws import Sampling


def adjusted(
    logits: Float[Tensor, "b v"],
    settings: Sequence[Sampling],
    texts: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
) -> Float[Tensor, "b v"]:
    """The logits after bias and penalties. They are not copied if no request has any.

    Args:
        logits: the model's logits.
        settings: the sampling settings of each request.
        texts: the token ids of each request, prompt and generated ones.
        prompt_lengths: how many of these are the prompt.
    """
    rows = [row for row, own in enumerate(settings) if own.adjusts_logits]
    if not rows:
        return logits
    logits = logits.clone()
    for row in rows:
        text = torch.tensor(texts[row], device=logits.device)
        logits[row] = _adjusted(logits[row], settings[row], text, text[prompt_lengths[row] :])
    return logits


def _adjusted(
    logits: Float[Tensor, " v"], settings: Sampling, text: Tensor, generated: Tensor
) -> Float[Tensor, " v"]:
    if settings.logit_bias:
        ids, bias = zip(*settings.logit_bias, strict=True)
        logits = logits.index_add(
            0,
            torch.tensor(ids, device=logits.device),
            torch.tensor(bias, dtype=logits.dtype, device=logits.device),
        )
    if settings.repetition_penalty != 1:
        seen = text.unique()
        own, penalty = logits[seen], settings.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(own > 0, own / penalty, own * penalty))
    if len(generated):
        counts = generated.bincount(minlength=len(logits))
        logits = logits - settings.frequency_penalty * counts
        logits = logits - settings.presence_penalty * (counts > 0)
    return logits
