"""A router of your own in fewer than 30 lines, named in YAML and trained for a few steps on text.

    python examples/custom_router.py [number of steps]

A token of `halting` depth goes on for as long as its score is above one half, and a loss holds the
mean score of a step at `share`. It looks at no other token, so it generates as it was trained.

Nothing else need know of the router: it trains in Megatron at any layout, generates, and is counted
by `mor plan` and shown by `mor inspect`. A YAML file names it by where it is imported from, with the
folder of this file in PYTHONPATH, or by its registered name where the module is imported already:

    recursion:
      num_recursions: 3
      router:
        type: custom_router:Halting  # `halting` once the module is imported
        share: 0.5

What the library cannot see for itself, settings may declare; see the methods of `RouterConfig`.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from omegaconf import OmegaConf
from torch import nn

from mor_layers import (
    DecoderConfig,
    DecoderOutput,
    MoRTransformer,
    Router,
    RouterConfig,
    from_mapping,
    register_router,
)
from mor_layers.routers import masked_mean


@register_router("halting")
@dataclass(frozen=True)
class Halting(RouterConfig):
    share: float = 0.5  # mean score that the loss holds at each step
    coefficient: float = 1.0  # weight of that loss

    @property
    def is_causal(self) -> bool:  # no choice reads later tokens: evaluate once
        return True

    def build(self, hidden_size: int, num_recursions: int) -> Router:
        return HaltingRouter(self, hidden_size, num_recursions)


class HaltingRouter(Router):
    def __init__(self, config: Halting, hidden_size: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.config = config
        self.scorers = nn.ModuleList(nn.Linear(hidden_size, 1) for _ in range(num_recursions))

    def logits(self, hidden, step):
        return self.scorers[step](hidden)  # [n b h] -> [n b 1]

    def decide(self, logits, step, previous, causal=False):
        scores = logits[..., 0].sigmoid()
        decision = previous.keep_where(scores > 0.5) if step else previous.keep_valid()
        return decision.with_gates(decision.taken(scores))

    def assess(self, logits, step, previous, decision):
        mean = masked_mean(logits[..., 0].sigmoid(), previous.tokens.counted)
        loss = self.config.coefficient * (mean - self.config.share).square()
        return decision.with_losses({"halting_loss": loss}, metrics={})


MODEL = """
vocab_size: 256
hidden_size: 64
ffn_hidden_size: 160
num_unrolled_layers: 5
num_heads: 4
recursion:
  num_recursions: 3
  sharing: middle_cycle
  router: {type: halting, share: 0.5}
"""


def text_batches(batch: int = 16, length: int = 64) -> Iterator[torch.Tensor]:
    """Random passages `[b s]` of Python's own documentation, byte by byte."""
    text = torch.tensor(list("\n".join(topics.values()).encode()))
    while True:
        starts = torch.randint(len(text) - length, (batch, 1))
        yield text[starts + torch.arange(length)]


def train(steps: int) -> Iterator[DecoderOutput]:
    """A fresh model on random passages; yields each step's output."""
    config = from_mapping(DecoderConfig, OmegaConf.to_object(OmegaConf.create(MODEL)))
    model = MoRTransformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _, ids in zip(range(steps), text_batches(), strict=False):
        output = model(ids, labels=torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -1)], dim=1))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.advance([output])
        yield output


def shares(output: DecoderOutput) -> list[float]:
    """Share of the tokens that ran each step."""
    return [(output.depths > step).float().mean().item() for step in range(3)]


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("steps", type=int, nargs="?", default=200, help="(default: 200)")
    torch.manual_seed(0)
    for i, output in enumerate(train(options.parse_args().steps), start=1):
        if i == 1 or i % 20 == 0:
            per_step = "  ".join(f"{share:4.0%}" for share in shares(output))
            print(f"step {i:4}  loss {output.lm_loss:.3f}  tokens that ran each step {per_step}")


if __name__ == "__main__":
    main()
