"""From logits to the next token, for many requests at once.

A request's random numbers are a function of its seed and of how many tokens it has generated, so
neither its neighbours nor a restart change what is drawn.

Legend: `b` requests, `v` vocabulary, `k` candidates.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

NUM_CANDIDATES = 512
"""Most likely tokens that are sorted for top-k and top-p; all are, where these do not suffice."""


@dataclass(frozen=True)
class Sampling:
    """How a request picks its tokens."""

    temperature: float = 0.0
    """0 takes the likeliest token. Above 0 samples from logits divided by it."""
    top_k: int = 0
    """Sample among so many of the likeliest tokens. 0, or more than there are: no limit."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability. In (0, 1]."""
    seed: int = 0
    """Which random numbers to use."""

    def __post_init__(self) -> None:
        # Integers have no largest value, but tensors must be able to hold the number.
        if not 0 <= self.temperature <= sys.float_info.max:
            raise ValueError(f"temperature={self.temperature} must be 0 or more, and finite.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (no limit) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1].")

    @property
    def is_limited(self) -> bool:
        """Whether only the likeliest tokens count."""
        return self.top_k > 0 or self.top_p < 1


Sampler = Callable[[Tensor, Sequence[Sampling], Sequence[int]], Tensor]
"""Something that picks tokens as `sample` does."""


def sample(
    logits: Float[Tensor, "b v"], settings: Sequence[Sampling], numbers: Sequence[int]
) -> Int[Tensor, " b"]:
    """The next token of each request.

    Args:
        logits: the largest one of each request must be finite, see `has_distribution`.
        settings: of each request.
        numbers: how many tokens each request has generated.
    """
    tokens = logits.argmax(dim=-1)
    for is_limited in (False, True):
        rows = [
            row
            for row, own in enumerate(settings)
            if own.temperature > 0 and own.is_limited == is_limited
        ]
        if rows:
            some = [settings[row] for row in rows]
            draw = torch.tensor(
                [_uniform(settings[row].seed, numbers[row]) for row in rows],
                dtype=torch.float64,
                device=logits.device,
            )
            temperature = torch.tensor(
                [own.temperature for own in some], dtype=torch.float64, device=logits.device
            )
            # Measured from the largest logit, which stays 0 at any temperature: close to 0 the
            # others become -inf, which is the limit, where the logits themselves would overflow.
            own_logits = logits[rows].double()
            largest = own_logits.amax(dim=-1, keepdim=True)
            scaled = (own_logits - largest) / temperature[:, None]
            tokens[rows] = _limited(scaled, some, draw) if is_limited else _drawn(scaled, draw)
    return tokens


def has_distribution(logits: Float[Tensor, "b v"]) -> Bool[Tensor, " b"]:
    """Whether logits say anything about the next token: neither NaN nor infinity, though single
    tokens may be ruled out with -inf."""
    return logits.amax(dim=-1).isfinite()  # the maximum passes NaN on


def _limited(
    logits: Float64[Tensor, "b v"], settings: Sequence[Sampling], draw: Float64[Tensor, " b"]
) -> Int[Tensor, " b"]:
    vocabulary = logits.shape[-1]
    device = logits.device
    top_p = torch.tensor([own.top_p for own in settings], dtype=torch.float64, device=device)
    top_k = torch.tensor(
        [min(own.top_k, vocabulary) or vocabulary for own in settings], device=device
    )
    total = logits.logsumexp(dim=-1, keepdim=True)
    for count in sorted({min(NUM_CANDIDATES, vocabulary), vocabulary}):
        best, tokens = logits.topk(count, dim=-1)
        probabilities = (best - total).exp()
        within_k = torch.arange(count, device=device) < top_k[:, None]
        # top-p counts the probability left after top-k, as is customary.
        kept = probabilities * within_k
        if count < vocabulary and not bool((top_k <= count).all()):
            kept_total = torch.where(top_k <= count, kept.sum(dim=-1), 1.0)
            if bool((kept.sum(dim=-1) < top_p * kept_total).any()):
                continue
        else:
            kept_total = kept.sum(dim=-1)
        before = (kept.cumsum(dim=-1) - kept) / kept_total[:, None]
        is_kept = within_k & (before < top_p[:, None])  # the likeliest always: 0 < top_p
        chosen = _drawn(best.masked_fill(~is_kept, -torch.inf), draw)
        return tokens.gather(-1, chosen[:, None])[:, 0]
    raise AssertionError("all tokens were candidates")


def _drawn(logits: Float64[Tensor, "b k"], draw: Float64[Tensor, " b"]) -> Int[Tensor, " b"]:
    """The candidate at which the cumulative probability passes the number drawn."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that a candidate of probability 0 is never drawn.
    wanted = torch.minimum(draw[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]


def _uniform(seed: int, number: int) -> float:
    """A number in [0, 1) from two integers: the SplitMix64 sequence of `seed`, entry `number`."""
    mask = (1 << 64) - 1
    state = (_mixed(seed & mask) + (number + 1) * 0x9E3779B97F4A7C15) & mask
    return (_mixed(state) >> 11) / (1 << 53)


def _mixed(state: int) -> int:
    mask = (1 << 64) - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)
