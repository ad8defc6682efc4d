"""Which cases a sweep runs: all pairs of values that may be used together, in few cases."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol

TRIES = 30
"""Cases that are considered for a pair, of which the one with the most new pairs is taken."""
MOST_REFUSALS = 300
"""Refused cases with a pair after which the pair itself counts as refused."""

Case = Mapping[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


class Refusal(Protocol):
    """Why a case is refused, or None if it can run."""

    def __call__(self, case: Case) -> str | None: ...


@dataclass
class Drawn:
    """Cases that cover every pair that can run, and the pairs that cannot."""

    cases: list[Case] = field(default_factory=list)
    refused: dict[Pair, Case] = field(default_factory=dict)
    """Of every pair that no case could have, the refused case with the most usual values."""
    num_pairs: int = 0


def draw(factors: Mapping[str, tuple[str, ...]], refusal: Refusal, seed: int) -> Drawn:
    """Cases with every pair of values of two factors, as far as it can run.

    Pairs are visited in a random order. A pair that no earlier case has gets a case of its own: of
    `TRIES` that can run, the one that brings the most pairs (Cohen et al. 1997, "The AETG system").

    Args:
        factors: values by name of the factor, the first of which is the usual one. As usual values
            go with most others, they are drawn half of the time.
    """
    generator = random.Random(seed)
    pairs = list(_all_pairs(factors))
    generator.shuffle(pairs)
    drawn, covered = Drawn(num_pairs=len(pairs)), set[Pair]()
    for pair in pairs:
        if pair in covered:
            continue
        found, refused = _cases_with(pair, factors, refusal, generator)
        if not found:
            usual = {name: values[0] for name, values in factors.items()}
            drawn.refused[pair] = min(refused, key=lambda case: len(case.items() - usual.items()))
            continue
        best = max(found, key=lambda case: len(set(pairs_of(case)) - covered))
        covered |= set(pairs_of(best))
        drawn.cases.append(best)
    return drawn


def _cases_with(
    pair: Pair,
    factors: Mapping[str, tuple[str, ...]],
    refusal: Refusal,
    generator: random.Random,
) -> tuple[list[Case], list[Case]]:
    """Cases with a pair, those that can run and those that are refused."""
    found: list[Case] = []
    refused: list[Case] = []
    while len(found) < TRIES and len(refused) < MOST_REFUSALS:
        drawn = {
            name: generator.choice([values[0], generator.choice(values)])
            for name, values in factors.items()
        }
        case = drawn | dict(pair)
        (found if refusal(case) is None else refused).append(case)
    return found, refused


def pairs_of(case: Case) -> Iterator[Pair]:
    """Every pair of values in a case, in the order of the factors."""
    return combinations(case.items(), 2)


def _all_pairs(factors: Mapping[str, tuple[str, ...]]) -> Iterator[Pair]:
    for (one, values), (other, others) in combinations(factors.items(), 2):
        for value in values:
            for second in others:
                yield (one, value), (other, second)


def described(case: Case, usual: Mapping[str, Any]) -> str:
    """A case in a line: its values that are not the usual ones."""
    return "; ".join(value for name, value in case.items() if usual.get(name) != value)
