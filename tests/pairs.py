"""A few cases of a cross product for every day, the rest for the exhaustive sweeps."""

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import pytest

Case = tuple[Any, ...]


def covering(cases: Iterable[Case]) -> list[Case]:
    """Some of `cases`, in their order, that have among them every pair of values of any case.

    Most mistakes show where two settings meet; which third one is there rarely matters. Each turn
    takes the case with the most pairs that are still missing, the first of several.
    """
    remaining = list(cases)
    missing = {pair for case in remaining for pair in _pairs(case)}
    chosen = set()
    while missing:
        best = max(remaining, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        chosen.add(best)
    return [case for case in remaining if case in chosen]


def sweep(cases: Iterable[Case], daily: Iterable[Case]) -> list[Any]:
    """Parameters of all `cases`; those that are not in `daily` have the marker `full`.

    Raises:
        ValueError: `daily` has a case that is none of `cases`, such as a misspelt one.
    """
    cases, daily = list(cases), set(daily)
    if unknown := daily - set(cases):
        raise ValueError(f"{sorted(unknown)} are none of the cases {cases}")
    return [pytest.param(*case, marks=() if case in daily else pytest.mark.full) for case in cases]


def pairwise_sweep(cases: Iterable[Case]) -> list[Any]:
    """Parameters of all `cases`; every day run those that `covering` chooses."""
    cases = list(cases)
    return sweep(cases, covering(cases))


def _pairs(case: Case) -> set[tuple[tuple[int, Any], ...]]:
    return set(combinations(enumerate(case), 2))
