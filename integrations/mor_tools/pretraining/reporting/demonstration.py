"""The trained model at work: a continuation of a prompt, and the depth it gives to each token.

Both run where generation does: on one process, in the torch model, by the engine that serves it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mor_layers import MoRTransformer
from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request, Sampling
from mor_tools.pretraining.data.text import TextTokenizer
from mor_tools.pretraining.settings import Settings


@dataclass(frozen=True)
class TokenDepth:
    """A token of a passage."""

    text: str
    """Its text."""
    depth: int
    """Recursion steps it took."""


def continuation(model: MoRTransformer, settings: Settings, tokenizer: TextTokenizer) -> str:
    """The prompt and what the model makes of it."""
    evaluation = settings.evaluation
    prompt = tokenizer.encode(evaluation.prompt)[: settings.data.sequence_length // 2]
    request = Request(
        tuple(prompt),
        evaluation.sample_tokens,
        Sampling(evaluation.temperature, seed=settings.training.seed),
        stop_ids=(tokenizer.eod,),
    )
    length = len(prompt) + evaluation.sample_tokens
    engine = DepthBatchingEngine(model, CacheSettings.for_all_steps(model, length))
    tokens = [event.token for event in engine.stream(request) if event.token is not None]
    return tokenizer.decode([*prompt, *(token for token in tokens if token != tokenizer.eod)])


@torch.no_grad()
def depths(
    model: MoRTransformer, sample: dict[str, Tensor], tokenizer: TextTokenizer
) -> list[TokenDepth]:
    """A held-out passage with the depth of each token; empty without recursion.

    Args:
        sample: `tokens` `[s]`, and `documents` where they are kept apart.
    """
    if model.config.recursion is None:
        return []
    tokens, documents = sample["tokens"], sample.get("documents")
    device = model.embedding.weight.device
    taken = model(
        tokens[None].to(device),
        documents=None if documents is None else documents[None].to(device),
        causal_routing=True,
    ).depths[0]
    return [
        TokenDepth(tokenizer.decode([token]), depth)
        for token, depth in zip(tokens.tolist(), taken.tolist(), strict=True)
    ]
