"""What arithmetic and memory allow a recursion, over a plain model in the same engine.

Everything is computed for the depth that tokens really took.
"""

from dataclasses import dataclass

from mor_layers import DecoderConfig
from mor_layers.costs import account
from mor_layers.generation import CACHE_POLICIES


@dataclass(frozen=True)
class Served:
    """A model under load."""

    config: DecoderConfig
    prompt: float
    """Mean length of the prompts."""
    new_tokens: int
    """Generated for each request."""
    depth: float
    """Steps of a token, in the mean."""
    sequences: float
    """In flight, in the mean."""

    @property
    def flops(self) -> float:
        """FLOPs of a generated token, its share of the prompt included."""
        length = self.prompt + self.new_tokens
        tokens, shares = None, _shares(self.config)
        if len(shares) > 1:
            deeper = (self.depth - 1) / (sum(shares) - 1)
            tokens = [length * min(1.0, share * deeper) for share in shares[1:]]
            tokens = [length, *tokens]
        cost = account(self.config, length, tokens, causal_half=True)
        # Logits are computed where a token is generated only.
        logits = cost.forward.output / length
        return (cost.forward.total - cost.forward.output) / self.new_tokens + logits

    @property
    def numbers_read(self) -> float:
        """Numbers, weights and keys, that are read for a generated token."""
        length = self.prompt + self.new_tokens / 2
        cost = account(self.config, round(length))
        weights = cost.parameters.total - cost.parameters.embedding
        runs = 2 if self.config.recursion is not None else 0
        layers = (self.config.num_unrolled_layers - runs) / len(_shares(self.config))
        row = 2 * self.config.kv_heads * self.config.head_size
        seen = sum(_seen(self.config)) * layers + runs
        # A tick reads the weights once, and finishes sequences / depth tokens.
        return weights * self.depth / self.sequences + seen * row * length


@dataclass(frozen=True)
class Prices:
    """What a FLOP and a number read cost on this machine, from two runs of the plain model."""

    flop: float
    """Seconds."""
    number: float
    """Seconds for a weight or a number of a key or value."""

    @classmethod
    def of(cls, few: tuple[Served, float], many: tuple[Served, float]) -> "Prices":
        """Solve `seconds = flop * flops + number * numbers_read` for two numbers of sequences.

        A processor that only multiplies would need as long for a token with few sequences as with many;
        one that only waits for weights would need in proportion to what it reads. Where noise makes a
        price negative, it is 0 and the other explains the larger batch.

        Args:
            few: a plain model under load, and the seconds that a token of it took.
            many: the same with more sequences in flight.
        """
        (a, b), (c, d) = ((run.flops, run.numbers_read) for run, _ in (few, many))
        (_, first), (_, second) = few, many
        determinant = a * d - b * c
        flop = (first * d - b * second) / determinant
        number = (a * second - c * first) / determinant
        if number < 0:
            return cls(second / c, 0.0)
        if flop < 0:
            return cls(0.0, second / d)
        return cls(flop, number)

    def seconds(self, served: Served) -> float:
        """What a token of a model must take at these prices, if nothing else takes time."""
        return self.flop * served.flops + self.number * served.numbers_read


def sequence_bytes(config: DecoderConfig, length: int, itemsize: int) -> float:
    """Expected bytes of one sequence's keys and values."""
    return account(config, length).kv_bytes(bytes_per_number=itemsize)


def kv_bytes_ratio(config: DecoderConfig) -> float:
    """Rows that the routed layers keep, over one for each step of each token."""
    assert config.recursion is not None
    kind, shares = CACHE_POLICIES[config.recursion.kv_policy], _shares(config)
    return sum(kind.rows_for(shares, 1.0)) / len(shares)


def _shares(config: DecoderConfig) -> tuple[float, ...]:
    if config.recursion is None:
        return (1.0,)
    steps = config.recursion.num_recursions
    return config.recursion.router.capacity_factors_for(steps) or (1.0,) * steps


def _seen(config: DecoderConfig) -> list[float]:
    """For each step, rows that its queries see times the share of tokens that run it."""
    shares = _shares(config)
    is_wise = config.recursion is None or config.recursion.kv_policy == "recursion_wise"
    return [share * (share if is_wise else shares[0]) for share in shares]
