"""Tokens in flight against lists of single tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor_layers.generation.tick.in_flight import Pool, Rows

NUM_STEPS = 3


def pool_of(counts: list[int], first: int = 0, has_origin: bool = True) -> Pool:
    """Tokens `first`, `first + 1`, ...: everything about a token follows from its number.

    Plans have as many numbers as the step; at step 0 there is none.
    """
    number = torch.arange(first, first + sum(counts))
    steps = torch.arange(NUM_STEPS + 1).repeat_interleave(torch.tensor(counts))
    hidden = torch.stack([number.float(), -number.float()], dim=1)
    rows = Rows.of(hidden, number % 5, steps, number + 100, number + 200)
    parts = number.float().split(counts)
    plans = [own[:, None].expand(-1, step) for step, own in enumerate(parts)]
    origin = hidden + 0.5 if has_origin else None
    return Pool(rows, tuple(counts), (None, *plans[1:]), parts, origin)


def numbers(pool: Pool) -> list[int]:
    """The tokens by number, after a check that nothing about them was mixed up."""
    found = pool.rows.hidden[:, 0].long()
    assert torch.equal(pool.rows.hidden[:, 1].long(), -found)
    assert torch.equal(pool.rows.slots, found % 5)
    assert torch.equal(pool.rows.positions, found + 100)
    assert torch.equal(pool.rows.places, found + 200)
    assert pool.origin is None or torch.equal(pool.origin, pool.rows.hidden + 0.5)
    for step, own in pool.parts():
        assert pool.rows.steps[own].tolist() == [step] * pool.counts[step]
        assert torch.equal(pool.gates[step], found[own].float())
        plan = pool.plans[step]
        assert (plan is None) == (step == 0)
        assert plan is None or torch.equal(plan, found[own, None].float().expand(-1, step))
    assert len(pool) == sum(pool.counts) == len(found)
    return found.tolist()


some_counts = st.lists(st.integers(0, 3), min_size=NUM_STEPS + 1, max_size=NUM_STEPS + 1)


@given(some_counts, st.sets(st.integers(0, 11)), st.booleans())
def test_taking_keeps_what_belongs_to_each_token(counts, wanted, has_origin):
    kept = sorted(i for i in wanted if i < sum(counts))
    assert numbers(pool_of(counts, has_origin=has_origin).take(kept)) == kept


@given(some_counts, st.integers(0, 4))
def test_a_sequence_that_is_given_up_takes_its_tokens_along(counts, slot):
    pool = pool_of(counts)
    assert numbers(pool.without(slot)) == [i for i in range(len(pool)) if i % 5 != slot]
    assert pool.rows.without(slot).positions.tolist() == [
        i + 100 for i in range(len(pool)) if i % 5 != slot
    ]


@given(st.integers(0, 3), some_counts)
def test_tokens_that_enter_stand_before_those_of_later_steps(entering, counts):
    first = pool_of([entering, 0, 0, 0])
    later = pool_of([0, *counts[1:]], first=entering)
    both = later.behind(first)
    assert numbers(both) == list(range(entering + sum(counts[1:])))
    assert both.counts == (entering, *counts[1:])


def test_a_step_leads_to_the_next_with_its_plan_and_without_its_gates():
    pool = pool_of([2, 0, 1, 0])
    hidden, entries = torch.rand(3, 2), torch.tensor([7, 8, 9])
    after = pool.advanced(hidden, entries)
    assert after.counts == (0, 2, 0, 1)
    assert after.rows.hidden is hidden
    assert after.rows.steps.tolist() == [1, 1, 3]
    assert after.rows.entries.tolist() == [7, 8, 9]
    assert torch.equal(after.rows.slots, pool.rows.slots)
    assert after.plans[1] is None
    assert torch.equal(after.plans[3], pool.plans[2])
    assert set(after.gates) == {None}
    assert torch.equal(after.origin_of(slice(1, 3)), pool.origin[1:3])


@pytest.mark.parametrize("step", [0, NUM_STEPS])
def test_a_pool_begins_at_one_step(step):
    rows = Rows.of(torch.rand(4, 2), *torch.arange(16).view(4, 4))
    pool = Pool.at(step, NUM_STEPS, rows)
    assert list(pool.parts()) == [(step, slice(0, 4))]
    assert pool.origin_of(slice(0, 4)) is None


def test_an_empty_pool_has_no_parts():
    assert list(pool_of([0, 0, 0, 0]).parts()) == []
    assert numbers(pool_of([0, 0, 0, 0]).without(1)) == []
