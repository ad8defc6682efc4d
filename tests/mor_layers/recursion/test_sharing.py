"""Which weights run at which depth."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor_layers.recursion import SHARING_SCHEMES, SharingSchedule


@pytest.mark.parametrize(
    ("sharing", "num_unrolled_layers", "order"),
    [
        ("cycle", 6, "AB AB AB"),
        ("sequence", 6, "AAA BBB"),
        ("middle_cycle", 8, "A BC BC BC D"),
        ("middle_sequence", 8, "A BBB CCC D"),
    ],
)
def test_each_scheme_runs_its_layers_in_the_papers_order(sharing, num_unrolled_layers, order):
    schedule = SharingSchedule(num_unrolled_layers, 3, sharing)
    letters = "".join("ABCD"[layer] for layer in schedule.unrolled)
    assert letters == order.replace(" ", "")
    assert schedule.has_published_ends


@pytest.mark.parametrize(
    ("sharing", "ends", "order"),
    [
        ("middle_cycle", (2, 3), "AB CDCD EFG"),
        ("cycle", (2, 3), "AB CDCD EFG"),
        ("middle_sequence", (2, 1), "AB CCDD E"),
        ("sequence", (0, 2), "AABB CD"),
        ("middle_cycle", (0, 0), "ABAB"),
        ("middle_cycle", (2, None), "AB CDCD E"),
        ("cycle", (None, 1), "ABAB C"),
    ],
)
def test_given_lengths_replace_those_of_the_scheme(sharing, ends, order):
    letters = order.replace(" ", "")
    schedule = SharingSchedule(len(letters), 2, sharing, *ends)
    assert "".join("ABCDEFG"[layer] for layer in schedule.unrolled) == letters
    assert not schedule.has_published_ends


LENGTHS = st.none() | st.integers(0, 4)


@given(
    sharing=st.sampled_from(SHARING_SCHEMES),
    num_recursions=st.integers(1, 7),
    block_size=st.integers(1, 5),
    before=LENGTHS,
    after=LENGTHS,
)
def test_every_layer_of_the_block_runs_once_per_recursion(
    sharing, num_recursions, block_size, before, after
):
    ends = sum(ends_of(sharing, before, after))
    schedule = SharingSchedule(
        block_size * num_recursions + ends, num_recursions, sharing, before, after
    )
    assert schedule.block_size == block_size
    assert (schedule.prelude, schedule.coda) == ends_of(sharing, before, after)
    assert len(schedule.unrolled) == schedule.num_unrolled_layers
    assert schedule.num_unique_layers == len(set(schedule.unrolled)) == block_size + ends
    shared = schedule.unrolled[schedule.prelude : len(schedule.unrolled) - schedule.coda]
    assert all(shared.count(layer) == num_recursions for layer in set(shared))
    if schedule.is_cyclic:
        assert shared == shared[:block_size] * num_recursions
    else:
        assert shared == tuple(sorted(shared))
    unshared = {*schedule.unrolled[: schedule.prelude]}
    unshared |= {*schedule.unrolled[len(schedule.unrolled) - schedule.coda :]}
    assert len(unshared) == ends
    assert unshared.isdisjoint(shared)


def ends_of(sharing, before, after) -> tuple[int, int]:
    by_scheme = 1 if sharing.startswith("middle") else 0
    return (by_scheme if before is None else before, by_scheme if after is None else after)


@given(
    sharing=st.sampled_from(SHARING_SCHEMES),
    num_recursions=st.integers(1, 7),
    num_unrolled_layers=st.integers(1, 40),
    before=LENGTHS,
    after=LENGTHS,
)
def test_a_count_that_does_not_divide_names_the_nearest_that_do(
    sharing, num_recursions, num_unrolled_layers, before, after
):
    ends = sum(ends_of(sharing, before, after))
    allowed = [ends + size * num_recursions for size in range(1, 50)]
    if num_unrolled_layers in allowed:
        SharingSchedule(num_unrolled_layers, num_recursions, sharing, before, after)
        return
    with pytest.raises(ValueError, match=f"num_unrolled_layers={num_unrolled_layers}") as error:
        SharingSchedule(num_unrolled_layers, num_recursions, sharing, before, after)
    for name, value in (("prelude_layers", before), ("coda_layers", after)):
        assert (f"{name}={value}" in str(error.value)) == (value is not None)
    nearest = [n for n in allowed if n < num_unrolled_layers][-1:]
    nearest += [n for n in allowed if n > num_unrolled_layers][:1]
    advice = str(error.value).rsplit("Use ", 1)[1]
    assert [int(number) for number in re.findall(r"\d+", advice)] == nearest
