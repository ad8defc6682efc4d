"""The trained model at work: a continuation of a prompt, and the depth it gives to each token."""

from dataclasses import dataclass

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset

from pretraining import distributed
from pretraining.settings import Settings
from pretraining.text import TextTokenizer
from pretraining.training import Trainer


@dataclass(frozen=True)
class TokenDepth:
    """A token of a passage."""

    text: str
    """Its text."""
    depth: int
    """Recursion steps it took."""


def continuation(trainer: Trainer, settings: Settings, tokenizer: TextTokenizer) -> str:
    """The prompt and what the model makes of it; every rank calls it.

    The whole sequence is run again for every token.
    """
    ids = tokenizer.encode(settings.evaluation.prompt)[: settings.data.sequence_length // 2]
    device = distributed.device()
    generator = torch.Generator(device).manual_seed(settings.training.seed)
    tokens = torch.zeros(1, settings.data.sequence_length, dtype=torch.long, device=device)
    is_padding = torch.ones_like(tokens, dtype=torch.bool)
    tokens[0, : len(ids)] = torch.tensor(ids)
    end = min(len(ids) + settings.evaluation.sample_tokens, settings.data.sequence_length)
    for position in range(len(ids), end):
        is_padding[0, :position] = False
        logits = trainer.next_token_logits(tokens, is_padding)
        chosen = _choose(logits, settings.evaluation.temperature, generator)
        torch.distributed.broadcast(chosen, src=0)
        if chosen.item() == tokenizer.eod:
            break
        tokens[0, position] = chosen
        ids.append(int(chosen))
    return tokenizer.decode(ids)


def depths(trainer: Trainer, held_out: GPTDataset, tokenizer: TextTokenizer) -> list[TokenDepth]:
    """A held-out passage with the depth of each token; empty without recursion. All ranks call."""
    sample = held_out[0]
    tokens = sample["tokens"]
    taken = trainer.depths({n: sample[n][None] for n in ("tokens", "documents") if n in sample})
    if taken is None:
        return []
    return [
        TokenDepth(tokenizer.decode([token]), depth)
        for token, depth in zip(tokens.tolist(), taken, strict=True)
    ]


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    if temperature == 0.0:
        return logits.argmax()[None]
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
