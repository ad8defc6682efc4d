"""A few cases stand for a cross product, and no pair of values is lost."""

from itertools import combinations, product

import pytest

from tests.pairs import covering, pairwise_sweep, sweep


def pairs(cases) -> set:
    return {pair for case in cases for pair in combinations(enumerate(case), 2)}


def test_every_pair_stays_in_a_fraction_of_the_cases():
    allowed = [c for c in product("abcdef", "xyz", range(2), range(2)) if c[:2] != ("a", "x")]
    chosen = covering(allowed)
    assert pairs(chosen) == pairs(allowed)
    assert len(chosen) <= 20  # 17 first pairs need a case each; all cases are 68
    assert chosen == [case for case in allowed if case in chosen]
    assert covering([]) == []


def test_the_cases_that_are_left_out_are_marked():
    cases = list(product("ab", "xy", range(2)))
    parameters = pairwise_sweep(cases)
    assert [p.values for p in parameters] == cases
    assert [p.values for p in parameters if not p.marks] == covering(cases)
    assert {mark.name for p in parameters for mark in p.marks} == {"full"}
    with pytest.raises(ValueError, match=r"\('c', 'x', 0\).* none of the cases"):
        sweep(cases, [("c", "x", 0)])
