"""Sampling of the next token from logits, for a batch of requests.

The random numbers of a request depend only on its seed and on how many tokens it has generated.
Therefore neither the other requests of a batch nor a preemption change the tokens that are sampled.

Legend: `b` requests, `v` vocabulary, `k` candidates.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

NUM_CANDIDATES = 512
"""Number of most likely tokens that top-k and top-p sort first. If these do not decide the result,
the whole vocabulary is sorted."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen."""

    temperature: float = 0.0
    """0 chooses the most likely token. Otherwise the logits are divided by it before sampling."""
    top_k: int = 0
    """Sample among the `top_k` most likely tokens. 0, or more than the vocabulary: no limit."""
    top_p: float = 1.0
    """Sample among the smallest set of most likely tokens whose total probability reaches this
    value. In (0, 1]."""
    min_p: float = 0.0
    """Sample among the tokens whose probability is at least this share of the most likely token's,
    before `top_k` and `top_p` apply. In [0, 1]. 0: no limit. (arXiv:2407.01082)"""
    seed: int = 0
    """Seed of the request's random numbers."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of all tokens that occur in the prompt or
    in the generated text. In 0.01..100. 1: no penalty. (arXiv:1909.05858)"""
    presence_penalty: float = 0.0
    """Is subtracted from the logits of tokens that were generated. In -2..2."""
    frequency_penalty: float = 0.0
    """Is subtracted from the logit of a token for each time that it was generated. In -2..2."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to their logits. In -100..100."""

    def __post_init__(self) -> None:
        # Integers have no largest value, but tensors must be able to hold the number.
        if not 0 <= self.temperature <= sys.float_info.max:
            raise ValueError(f"temperature={self.temperature} must be 0 or more, and finite.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (no limit) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1].")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be in [0, 1].")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be in 0.01..100; 1 is no penalty."
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name}={getattr(self, name)} must be in -2..2; 0 is no penalty.")
        if not all(-100 <= bias <= 100 for _, bias in self.logit_bias):
            raise ValueError(f"logit_bias={self.logit_bias} must have values in -100..100.")

    @property
    def adjusts_logits(self) -> bool:
        """Whether the logits change before they are sampled, see `penalties`."""
        penalties = self.presence_penalty, self.frequency_penalty
        return bool(self.logit_bias) or self.repetition_penalty != 1 or any(penalties)

    @property
    def is_limited(self) -> bool:
        """Whether top-k or top-p restricts the tokens that can be sampled."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def signed_seed(self) -> int:
        """The seed as a signed 64-bit integer, which a tensor can hold."""
        return _signed(self.seed)

    def top_k_of(self, vocabulary: int) -> int:
        """How many tokens `top_k` leaves of so many."""
        return min(self.top_k, vocabulary) or vocabulary


Sampler = Callable[[Tensor, Sequence[Sampling], Sequence[int]], Tensor]
"""A function that chooses the next tokens, with the signature of `sample`."""


def sample(
    logits: Float[Tensor, "b v"], settings: Sequence[Sampling], numbers: Sequence[int]
) -> Int[Tensor, " b"]:
    """The next token of each request.

    Args:
        logits: the logits of each request. Their maximum must be finite, see `has_distribution`.
        settings: the sampling settings of each request.
        numbers: number of tokens that each request has generated.
    """
    groups: dict[Callable[..., Tensor], list[int]] = {}
    for row, own in enumerate(settings):
        groups.setdefault(_way_of(own), []).append(row)
    if len(groups) == 1:  # the rows of a batch whose requests are alike are not copied
        (choose,) = groups
        return choose(logits, settings, numbers)
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for choose, rows in groups.items():
        own_settings, own_numbers = [settings[row] for row in rows], [numbers[row] for row in rows]
        tokens[rows] = choose(logits[rows], own_settings, own_numbers)
    return tokens


def _way_of(settings: Sampling) -> Callable[..., Tensor]:
    """What chooses the tokens of a request."""
    if settings.temperature == 0:
        return _most_likely
    return _sampled_within_limits if settings.is_limited else _sampled


def _most_likely(
    logits: Float[Tensor, "b v"], settings: Sequence[Sampling], numbers: Sequence[int]
) -> Int[Tensor, " b"]:
    return logits.argmax(dim=-1)


def _sampled(
    logits: Float[Tensor, "b v"], settings: Sequence[Sampling], numbers: Sequence[int]
) -> Int[Tensor, " b"]:
    return drawn(_scaled(logits, settings), _draws(settings, numbers, logits.device))


def _sampled_within_limits(
    logits: Float[Tensor, "b v"], settings: Sequence[Sampling], numbers: Sequence[int]
) -> Int[Tensor, " b"]:
    device, vocabulary = logits.device, logits.shape[-1]
    top_k = torch.tensor([own.top_k_of(vocabulary) for own in settings], device=device)
    top_p = torch.tensor([own.top_p for own in settings], dtype=torch.float64, device=device)
    scaled, draws = _scaled(logits, settings), _draws(settings, numbers, device)
    tokens, is_decided = drawn_within_limits(scaled, top_k, top_p, draws, NUM_CANDIDATES)
    rows = is_decided.logical_not().nonzero()[:, 0]
    if len(rows):
        rest = scaled[rows], top_k[rows], top_p[rows], draws[rows]
        tokens[rows], _ = drawn_within_limits(*rest, vocabulary)
    return tokens


def _scaled(logits: Float[Tensor, "b v"], settings: Sequence[Sampling]) -> Float64[Tensor, "b v"]:
    pairs = torch.tensor([(own.temperature, own.min_p) for own in settings], dtype=torch.float64)
    temperature, min_p = pairs.to(logits.device).unbind(dim=1)
    return scaled(logits, temperature, min_p if any(own.min_p for own in settings) else None)


def scaled(
    logits: Float[Tensor, "b v"],
    temperature: Float64[Tensor, " b"],
    min_p: Float64[Tensor, " b"] | None = None,
) -> Float64[Tensor, "b v"]:
    """The logits at each request's temperature, without the tokens that its `min_p` leaves out.

    Args:
        min_p: None: no request limits its tokens in this way.
    """
    # Subtract the largest logit before dividing. It is then 0 at any temperature. At very small
    # temperatures the others become -inf, which is the correct limit, whereas the logits themselves
    # would overflow.
    scaled = logits.to(torch.float64, copy=True)
    scaled.sub_(scaled.amax(dim=-1, keepdim=True)).div_(temperature[:, None])
    if min_p is not None and (min_p.is_cuda or bool(min_p.any())):  # a GPU is not asked
        scaled.masked_fill_(scaled < min_p.log()[:, None], -torch.inf)
    return scaled


def _draws(
    settings: Sequence[Sampling], numbers: Sequence[int], device: torch.device
) -> Float64[Tensor, " b"]:
    """The random number of each request."""
    pairs = zip(settings, numbers, strict=True)
    bits = [random_bits(own.signed_seed, number) for own, number in pairs]
    return uniform(torch.tensor(bits, device=device))


def uniform(bits: Int[Tensor, " b"]) -> Float64[Tensor, " b"]:
    """Numbers in [0, 1) from `random_bits`."""
    return bits.double() / (1 << 53)


def distribution(logits: Float[Tensor, "b v"], settings: Sampling) -> Float64[Tensor, "b v"]:
    """The probabilities with which `sample` chooses each token.

    Args:
        settings: those of all rows. Penalties and bias do not count, see `penalties`.
    """
    if settings.temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).double()
    scaled = _scaled(logits, [settings] * len(logits))
    if not settings.is_limited:
        return scaled.softmax(dim=-1)
    best, tokens = scaled.sort(dim=-1, descending=True)
    kept = best.softmax(dim=-1)
    if settings.top_k:
        kept[:, settings.top_k :] = 0.0
    kept /= kept.sum(dim=-1, keepdim=True)
    kept = kept.where(kept.cumsum(dim=-1) - kept < settings.top_p, 0.0)
    kept /= kept.sum(dim=-1, keepdim=True)
    return torch.zeros_like(kept).scatter_(-1, tokens, kept)


def has_distribution(logits: Float[Tensor, "b v"]) -> Bool[Tensor, " b"]:
    """Whether the logits define a distribution: no NaN, no +inf, and not -inf for every token."""
    return logits.amax(dim=-1).isfinite()  # the maximum propagates NaN


def drawn_within_limits(
    logits: Float64[Tensor, "b v"],
    top_k: Int[Tensor, " b"],
    top_p: Float64[Tensor, " b"],
    draw: Float64[Tensor, " b"],
    num_candidates: int,
) -> tuple[Int[Tensor, " b"], Bool[Tensor, " b"]]:
    """Tokens drawn within `top_k` and `top_p`, with shapes that do not depend on values.

    Args:
        logits: what `scaled` returned.
        top_k: at most the vocabulary.
        num_candidates: how many of the most likely tokens are looked at, at most.

    Returns:
        The tokens, and for which requests they are right: for all if every token is a candidate.
    """
    vocabulary = logits.shape[-1]
    count = min(num_candidates, vocabulary)
    total = logits.logsumexp(dim=-1, keepdim=True)
    best, tokens = logits.topk(count, dim=-1)
    probabilities = (best - total).exp()
    within_k = torch.arange(count, device=logits.device) < top_k[:, None]
    # top-p counts the probability left after top-k, as is customary.
    kept = probabilities * within_k
    kept_sum = kept.sum(dim=-1)
    kept_total = kept_sum.where(top_k <= count, 1.0)
    before = (kept.cumsum(dim=-1) - kept) / kept_total[:, None]
    # The most likely token is always kept, because its `before` is 0 and top_p is above 0.
    is_kept = within_k & (before < top_p[:, None])
    chosen = drawn(best.masked_fill(~is_kept, -torch.inf), draw)
    chosen = chosen.clamp(max=count - 1)  # a row without a distribution has no candidate at all
    return tokens.gather(-1, chosen[:, None])[:, 0], kept_sum >= top_p * kept_total


def drawn(logits: Float64[Tensor, "b k"], draw: Float64[Tensor, " b"]) -> Int[Tensor, " b"]:
    """The first candidate at which the cumulative probability exceeds the random number.

    Args:
        logits: those of each request, the largest of which is 0.
    """
    cumulative = logits.exp().cumsum(dim=-1)  # not divided by its total, which `wanted` contains
    total = cumulative[:, -1:]
    # Strictly below the total, so that a candidate of probability 0 is never drawn.
    wanted = torch.minimum(draw[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]


def random_bits[Number: (int, Tensor)](seed: Number, number: Number) -> Number:
    """53 random bits: those of entry `number` of the SplitMix64 sequence that starts at `seed`.

    Args:
        seed: see `Sampling.signed_seed`; integers, or tensors of them for a graph.
    """
    state = _wrapped(_mixed(seed) + (number + 1) * _signed(0x9E3779B97F4A7C15))
    return _shifted(_mixed(state), 11)


def _mixed[Number: (int, Tensor)](state: Number) -> Number:
    state = _wrapped((state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9))
    state = _wrapped((state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB))
    return state ^ _shifted(state, 31)


def _shifted[Number: (int, Tensor)](state: Number, bits: int) -> Number:
    """Numbers without so many of their last bits, of 64 without a sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _wrapped[Number: (int, Tensor)](state: Number) -> Number:
    """The signed 64-bit integers that have the same last bits, as tensors hold them anyway."""
    return state if isinstance(state, Tensor) else _signed(state)


def _signed(number: int) -> int:
    """The signed 64-bit integer that has the last 64 bits of a number."""
    return ((number + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)
