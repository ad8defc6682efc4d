"""The trained model at work: the continuation of a prompt, and the depth of each token of a
passage.

Both run as generation does: in one process, in the torch model, by the engine that serves it (or,
where layers route by themselves, without caches).
"""

from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from mor_layers import MoRTransformer
from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request, Sampling
from mor_tools.pretraining.data.text import TextTokenizer
from mor_tools.pretraining.settings import Settings


@dataclass(frozen=True)
class TokenDepth:
    """A token of a passage and its depth."""

    text: str
    """The token's text."""
    depth: int
    """Number of recursion steps that it took."""


def continuation(model: MoRTransformer, settings: Settings, tokenizer: TextTokenizer) -> str:
    """The prompt followed by the model's continuation."""
    evaluation = settings.evaluation
    prompt = tokenizer.encode(evaluation.prompt)[: settings.data.sequence_length // 2]
    if any(recursion.routes_by_layer for recursion in model.config.recursions):
        return tokenizer.decode([*prompt, *_without_caches(model, prompt, settings, tokenizer.eod)])
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


def _without_caches(
    model: MoRTransformer, prompt: list[int], settings: Settings, eod: int
) -> list[int]:
    """The ids that continue a prompt, up to the end of its document."""
    device, evaluation = model.embedding.weight.device, settings.evaluation
    generated = model.eval().generate(
        torch.tensor([prompt], device=device),
        evaluation.sample_tokens,
        evaluation.temperature,
        torch.Generator(device).manual_seed(settings.training.seed),
    )
    return list(takewhile(lambda token: token != eod, (int(token) for token in generated)))


@torch.no_grad()
def depths(
    model: MoRTransformer, sample: dict[str, Tensor], tokenizer: TextTokenizer
) -> list[TokenDepth]:
    """A held-out passage with the depth of each token; empty for a model without recursion.

    Args:
        sample: `tokens` `[s]`, and `documents` if they are kept apart.
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
