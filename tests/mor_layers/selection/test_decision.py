"""Selecting tokens and putting them back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mor_layers import RoutingDecision, Tokens
from mor_layers.selection import capacity, put_rows, take_rows
from mor_layers.selection.capacity import capacities
from tests.mor_layers.small_models import columns
from tests.oracles import loops as reference


@st.composite
def batches(draw, max_length: int = 9, max_batch: int = 3) -> Tokens:
    """Whole sequences with any padding and any documents, all-padding rows included."""
    length, batch = draw(st.integers(1, max_length)), draw(st.integers(1, max_batch))

    def grid(values: st.SearchStrategy) -> torch.Tensor:
        row = st.lists(values, min_size=length, max_size=length)
        return columns(*draw(st.lists(row, min_size=batch, max_size=batch)))

    documents = grid(st.integers(0, 2)) if draw(st.booleans()) else None
    is_padding = grid(st.booleans()) if draw(st.booleans()) else None
    return Tokens.whole_sequence(length, batch, documents=documents, is_padding=is_padding)


shares = st.one_of(st.floats(0.01, 1.0), st.sampled_from([1 / 3, 0.5, 2 / 3, 1.0]))
seeds = st.integers(0, 1000)


def random_weights(tokens: Tokens, seed: int) -> torch.Tensor:
    return torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))


def kept_positions(tokens: Tokens) -> list[list[int]]:
    """Per sequence, the positions of the tokens that are not padding, as they stand."""
    return [
        [
            int(tokens.positions[i, j])
            for i in range(tokens.shape[0])
            if tokens.is_padding is None or not tokens.is_padding[i, j]
        ]
        for j in range(tokens.shape[1])
    ]


def top_positions(
    whole: Tokens, candidates: Tokens, weights: torch.Tensor, share: float, multiple: int = 1
) -> list[list[int]]:
    """What `keep_top` must keep, document by document."""
    documents = reference.split_documents(*whole.shape, whole.documents, whole.is_padding)
    kept: list[list[int]] = [[] for _ in range(whole.shape[1])]
    for document in documents:
        j = document.sequence
        weight = {int(candidates.positions[i, j]): weights[i, j] for i in range(len(weights))}
        running = [p for p in document.positions if p in kept_positions(candidates)[j]]
        capacity = max(1, math.floor(share * len(document.positions)))
        capacity = multiple * math.ceil(capacity / multiple)  # a slice ends at the document's end
        kept[j] += sorted(running, key=lambda p: -weight[p])[:capacity]
    return [sorted(positions) for positions in kept]


@given(tokens=batches(), first=shares, second=shares, multiple=st.integers(1, 6), seed=seeds)
def test_the_tokens_of_largest_weight_stay_in_order_in_every_document(
    tokens, first, second, multiple, seed
):
    decision = RoutingDecision.everything(tokens)
    for share in (max(first, second), min(first, second)):
        candidates, weights = decision.tokens, random_weights(decision.tokens, seed)
        decision = decision.keep_top(weights, share, multiple)
        expected = top_positions(tokens, candidates, weights, share, multiple)
        assert kept_positions(decision.tokens) == expected
        assert decision.tokens.is_padding is not None or share == 1 or tokens.is_plain


@given(tokens=batches(), seed=seeds)
def test_marked_tokens_stay_in_order_and_padding_is_never_kept(tokens, seed):
    is_marked = random_weights(tokens, seed) < 0.4
    decision = RoutingDecision.everything(tokens).keep_where(is_marked)
    is_selected = is_marked if tokens.is_padding is None else is_marked & ~tokens.is_padding
    expected = [
        [p for p in positions if is_selected[p, j]]
        for j, positions in enumerate(kept_positions(tokens))
    ]
    kept = decision.tokens
    assert kept_positions(kept) == expected
    assert kept.padding_trails
    assert kept.is_padding is not None
    assert kept.shape[0] == max(1, *map(len, expected))
    for j, positions in enumerate(expected):
        assert kept.is_padding[:, j].tolist() == [i >= len(positions) for i in range(kept.shape[0])]
    assert torch.equal(decision.is_selected(tokens.shape[0]), is_selected)
    assert int(kept.count) == int(is_selected.sum())


@given(tokens=batches(), share=shares, seed=seeds)
def test_a_decision_knows_document_and_position_of_its_rows(tokens, share, seed):
    decision = RoutingDecision.everything(tokens).keep_top(random_weights(tokens, seed), share)
    kept = decision.tokens
    for j in range(kept.shape[1]):
        for i in range(kept.shape[0]):
            row = i if decision.rows is None else int(decision.rows[i, j])
            assert kept.positions[i, j] == tokens.positions[row, j]
            if tokens.documents is not None:
                assert kept.documents[i, j] == tokens.documents[row, j]
            if tokens.document_lengths is not None:
                assert kept.document_lengths[i, j] == tokens.document_lengths[row, j]


@pytest.mark.parametrize("share", [0.29, 0.5, 2 / 3])
@pytest.mark.parametrize("length", [1, 2, 7, 24, 100])  # 0.29 · 100 is a little less than 29
def test_plain_sequences_keep_what_one_marked_document_keeps(length, share):
    plain = Tokens.whole_sequence(length, 2)
    marked = Tokens.whole_sequence(length, 2, documents=torch.full((length, 2), 5))
    weights = random_weights(plain, 0)
    kept = [RoutingDecision.everything(t).keep_top(weights, share).tokens for t in (plain, marked)]
    assert kept_positions(kept[0]) == kept_positions(kept[1])
    assert kept[0].shape[0] == max(1, math.floor(share * length))
    assert kept[0].is_plain


@pytest.mark.parametrize(
    ("share", "length", "multiple", "tokens"),
    [
        (1 / 3, 4096, 1, 1365),
        (1 / 3, 4096, 128, 1408),
        (0.5, 256, 128, 128),  # a multiple already
        (0.01, 1000, 64, 64),  # never 0
        (0.01, 50, 1, 1),
        (0.9, 100, 64, 100),  # 90 tokens would be 128, more than there are
    ],
)
def test_capacities_are_rounded_up_to_tiles_within_the_document(share, length, multiple, tokens):
    assert capacity(share, length, multiple) == tokens
    lengths = torch.tensor([[length], [0]])
    assert capacities(share, lengths, multiple).tolist() == [[tokens], [0]]


@pytest.mark.parametrize("documents", [None, columns([4, 4, 4, 1, 1, 1, 1])])
def test_equal_weights_do_not_exceed_the_capacity(documents):
    tokens = Tokens.whole_sequence(7, 1, documents=documents)
    kept = RoutingDecision.everything(tokens).keep_top(torch.ones(7, 1), 0.5).tokens
    assert int(kept.count) == (3 if documents is None else 1 + 2)


def test_keeping_everything_neither_sorts_nor_gathers():
    tokens = Tokens.whole_sequence(5, 2)
    decision = RoutingDecision.everything(tokens)
    for kept in (decision.keep_top(torch.rand(5, 2), 1.0), decision.keep_all()):
        assert kept.rows is None
        assert kept.tokens is tokens
    documents = Tokens.whole_sequence(5, 2, documents=torch.arange(10).view(5, 2))
    assert RoutingDecision.everything(documents).keep_top(torch.rand(5, 2), 1.0).rows is None


def test_a_capacity_that_is_every_candidate_neither_sorts_nor_gathers():
    decision = RoutingDecision.everything(Tokens.whole_sequence(6, 2)).keep_top(
        torch.rand(6, 2), 0.5
    )
    assert decision.rows is not None
    assert decision.keep_top(torch.rand(3, 2), 0.5).rows is None


def test_padding_between_tokens_moves_to_the_end():
    tokens = Tokens.whole_sequence(4, 2, is_padding=columns([1, 0, 1, 0], [0, 0, 0, 1]).bool())
    assert not tokens.padding_trails
    kept = RoutingDecision.everything(tokens).keep_valid().tokens
    assert kept_positions(kept) == [[1, 3], [0, 1, 2]]
    assert kept.padding_trails


def test_a_row_of_nothing_but_padding_selects_nothing():
    tokens = Tokens.whole_sequence(3, 2, is_padding=columns([1, 1, 1], [0, 0, 0]).bool())
    decision = RoutingDecision.everything(tokens).keep_top(torch.rand(3, 2), 0.7)
    assert [len(positions) for positions in kept_positions(decision.tokens)] == [0, 2]
    nothing = RoutingDecision.everything(tokens).keep_where(torch.zeros(3, 2, dtype=torch.bool))
    assert nothing.tokens.shape == (1, 2)
    assert int(nothing.tokens.count) == 0


def test_a_capacity_after_a_ragged_selection_is_a_share_of_the_whole_sequence():
    ragged = RoutingDecision.everything(Tokens.whole_sequence(6, 2)).keep_where(
        columns([1, 1, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0]).bool()
    )
    weights = torch.arange(5.0)[:, None].expand(5, 2)
    assert kept_positions(ragged.keep_top(weights, 0.5).tokens) == [[3, 4, 5], [1]]


def test_plans_travel_with_their_tokens():
    tokens = Tokens.whole_sequence(4, 2)
    plan = torch.rand(4, 2, 3)
    decision = RoutingDecision.everything(tokens).with_plan(plan)
    is_selected = columns([0, 1, 0, 1], [1, 0, 0, 0]).bool()
    kept = decision.keep_where(is_selected)
    assert torch.equal(kept.plan[:, 0], plan[[1, 3], 0])
    assert torch.equal(kept.plan[0, 1], plan[0, 1])
    assert decision.keep_all().plan is plan


@pytest.mark.parametrize(("n", "b", "k"), [(1, 1, 1), (7, 3, 4), (5, 1, 5), (4, 5, 1)])
def test_taking_and_putting_rows_equals_loops_with_their_gradients(n, b, k):
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(b)], dim=1)
    values = torch.randn(n, b, 3, generator=generator, requires_grad=True)
    updated = torch.randn(k, b, 3, generator=generator, requires_grad=True)
    taken = torch.stack([torch.stack([values[rows[i, j], j] for j in range(b)]) for i in range(k)])
    looped = [[values[i, j] for j in range(b)] for i in range(n)]
    for i in range(k):
        for j in range(b):
            looped[rows[i, j]][j] = updated[i, j]
    put = torch.stack([torch.stack(row) for row in looped])
    fast = (take_rows(values, rows), put_rows(values, updated, rows))
    for got, expected in zip(fast, (taken, put), strict=True):
        assert torch.equal(got, expected)
        seed = torch.randn(got.shape, generator=generator)
        grads = [
            torch.autograd.grad(
                out, (values, updated), seed, allow_unused=True, materialize_grads=True
            )
            for out in (got, expected)
        ]
        torch.testing.assert_close(grads[0], grads[1])


def test_documents_are_renumbered_along_the_sequence():
    tokens = Tokens.whole_sequence(6, 2, documents=columns([7, 7, 3, 3, 7, 7], [1, 1, 1, 1, 1, 2]))
    assert tokens.documents.T.tolist() == [[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1]]
    assert tokens.document_lengths.T.tolist() == [[2] * 6, [5] * 5 + [1]]


def test_padding_does_not_count_in_a_documents_length():
    tokens = Tokens.whole_sequence(
        5, 1, documents=columns([0, 0, 0, 1, 1]), is_padding=columns([1, 0, 0, 0, 1]).bool()
    )
    assert tokens.document_lengths.T.tolist() == [[2, 2, 2, 1, 1]]
    assert int(tokens.count) == 3


def test_a_sequence_of_one_token_may_name_its_document():
    tokens = Tokens.whole_sequence(1, 3, documents=torch.tensor([[4, 0, 2]]))
    assert tokens.documents.tolist() == [[0, 0, 0]]
    assert tokens.document_lengths.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("name", ["documents", "is_padding"])
def test_masks_of_another_shape_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 5\).*\(5, 2\), sequence first"):
        Tokens.whole_sequence(5, 2, **{name: torch.zeros(2, 5, dtype=torch.bool)})


class _Names(TorchDispatchMode):
    """Records the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def test_the_gradient_of_taken_rows_is_copied_and_not_added_up():
    values = torch.randn(7, 2, 3, requires_grad=True)
    rows = torch.tensor([[0, 2], [3, 5], [6, 6]])
    weights = torch.randn(3, 2, 3)
    taken = take_rows(values, rows)
    assert torch.equal(taken, values.gather(0, rows[..., None].expand(-1, -1, 3)))
    with _Names() as seen:
        (gradient,) = torch.autograd.grad((taken * weights).sum(), values)
    expected = torch.zeros_like(values)
    for i in range(3):
        for j in range(2):
            expected[rows[i, j], j] = weights[i, j]
    assert torch.equal(gradient, expected)
    # Additions of rows are atomic on a GPU, in an order that changes from run to run.
    assert not {"index_add", "index_add_", "scatter_add", "index_put"} & set(seen.names)
