"""Turns that several engines take on one processor, and what their rounds say.

A round is A, B, C, C, B, A: a drift of the machine's speed, a straight line over the time of a round,
adds the same to all and cancels in their ratios.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy

from benchmarks.paired_timing import CONFIDENCE, LEAST_SHARE, RESAMPLES, Estimate, estimate
from benchmarks.serving.feed import Turn


@dataclass(frozen=True)
class Rounds:
    """What each engine did in each round."""

    turns: Mapping[str, Sequence[tuple[Turn, Turn]]]
    """By engine, its two turns of each round."""

    def rate(self, name: str) -> float:
        """Tokens per second of an engine, the median of its rounds."""
        return statistics.median(map(_rate, self.turns[name]))

    def in_flight(self, name: str) -> float:
        """Requests in flight, the mean over its turns."""
        return statistics.mean(turn.in_flight for pair in self.turns[name] for turn in pair)

    def share(self, *names: str) -> float:
        """Of the processor, that engines had in their median turn."""
        own = [turn for name in names for pair in self.turns[name] for turn in pair]
        return statistics.median(turn.seconds / turn.passed for turn in own)

    def throughput(self, ours: str, theirs: str, scale: float = 1.0) -> Estimate:
        """Tokens per second of one engine over those of another, times `scale`."""
        pairs = zip(self.turns[ours], self.turns[theirs], strict=True)
        ratios = [scale * _rate(own) / _rate(other) for own, other in pairs]
        return estimate(ratios, self.share(ours, theirs))

    def waits(self, name: str) -> list[float]:
        """Seconds to the first token, of all requests that got theirs."""
        return [wait for pair in self.turns[name] for turn in pair for wait in turn.waits]

    def wait_ratio(self, ours: str, theirs: str, percentile: float) -> Estimate:
        """A percentile of the time to the first token, over another engine's.

        The requests of both are resampled for the interval.

        Raises:
            ValueError: an engine has given no first token.
        """
        own, other = (numpy.array(self.waits(name)) for name in (ours, theirs))
        if not len(own) or not len(other):
            raise ValueError(f"no first token was given by {ours} or {theirs}: take more rounds.")
        generator = numpy.random.default_rng(0)
        resampled = [
            numpy.percentile(generator.choice(waits, (RESAMPLES, len(waits))), percentile, axis=1)
            for waits in (own, other)
        ]
        edge = (1 - CONFIDENCE) / 2
        low, high = numpy.quantile(resampled[0] / resampled[1], [edge, 1 - edge])
        ratio = numpy.percentile(own, percentile) / numpy.percentile(other, percentile)
        count = min(len(own), len(other))
        return Estimate(float(ratio), float(low), float(high), count, self.share(ours, theirs))


def take_turns(
    engines: Mapping[str, Callable[[int], Turn]],
    tokens: int,
    rounds: int,
    minutes: float,
    seen: Callable[[int], None] = lambda number: None,
) -> Rounds:
    """Let engines take turns.

    Args:
        tokens: generated in a turn.
        rounds: how many, unless the time is over.
        minutes: for all rounds; the one that has begun is finished.
        seen: called with the number of rounds so far, after each.
    """
    turns: dict[str, list[tuple[Turn, Turn]]] = {name: [] for name in engines}
    end = time.monotonic() + 60 * minutes
    for number in range(1, rounds + 1):
        first = {name: run(tokens) for name, run in engines.items()}
        for name, run in reversed(engines.items()):
            turns[name].append((first[name], run(tokens)))
        seen(number)
        if time.monotonic() > end:
            break
    return Rounds(turns)


HEADINGS = ("", "found", "95 % interval", "target", "verdict", "share of the processor", "rounds")


@dataclass(frozen=True)
class Row:
    """A line of the table: what was found, and what is wanted."""

    name: str
    found: Estimate
    target: float
    is_least: bool = True
    """Whether at least the target is wanted, or at most."""

    @property
    def verdict(self) -> str:
        """Whether the target is met, as far as the rounds can tell."""
        low, high = self.found.low, self.found.high
        if not self.is_least:
            low, high = -high, -low
        target = self.target if self.is_least else -self.target
        said = "met" if low >= target else "missed" if high < target else "open"
        is_busy = self.found.share is not None and self.found.share < LEAST_SHARE
        return f"{said}, on a busy machine" if is_busy else said

    @property
    def cells(self) -> tuple[str, ...]:
        """What `HEADINGS` says."""
        found = self.found
        return (
            self.name,
            f"{found.ratio:.3f}",
            f"{found.low:.3f}–{found.high:.3f}",
            f"{'≥' if self.is_least else '≤'} {self.target:g}",
            self.verdict,
            "" if found.share is None else f"{found.share:.0%}",
            str(found.rounds),
        )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table of a page."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(row.cells for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def into_page(page: str, kind: str, rows: Sequence[Row]) -> str:
    """A page with the rows in place of the table that follows its comment `<!-- beside vLLM: kind -->`.

    Raises:
        ValueError: the page has no such comment.
    """
    mark = f"<!-- beside vLLM: {kind} -->\n\n"
    before, found, after = page.partition(mark)
    if not found:
        raise ValueError(
            f"the page has no line {mark.strip()!r}, after which the table would stand."
        )
    lines = after.splitlines(keepends=True)
    rest = itertools.dropwhile(lambda line: line.startswith("|"), lines)
    return before + mark + markdown(rows) + "".join(rest)


def _rate(turns: tuple[Turn, Turn]) -> float:
    return sum(turn.tokens for turn in turns) / sum(turn.seconds for turn in turns)
