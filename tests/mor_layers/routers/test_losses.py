"""Auxiliary losses against loops over tokens."""

import pytest
import torch

from mor_layers.routers import losses
from tests.mor_layers.small_models import columns
from tests.oracles import loops as reference

SIZES = [(1, 1, 1), (7, 1, 3), (5, 3, 2), (2, 5, 4)]


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).requires_grad_()


def random_weights(n: int, b: int, padded: bool) -> torch.Tensor | None:
    if not padded:
        return None
    return (torch.rand(n, b, generator=torch.Generator().manual_seed(9)) < 0.7).float()


def counted_places(n: int, b: int, weights: torch.Tensor | None) -> list[tuple[int, int]]:
    places = [(i, j) for j in range(b) for i in range(n)]
    return [place for place in places if weights is None or weights[place] > 0]


def assert_same_loss(fast: torch.Tensor, slow: torch.Tensor, *leaves: torch.Tensor) -> None:
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    grads = [
        torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        if loss.requires_grad
        else tuple(torch.zeros_like(leaf) for leaf in leaves)
        for loss in (fast, slow)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("n", "b", "r"), SIZES)
def test_sampling_loss_is_the_mean_cross_entropy_of_selections(n, b, r, padded):
    logits, weights = random_logits(n, b), random_weights(n, b, padded)
    is_selected = random_logits(n, b, seed=1) > 0
    places = counted_places(n, b, weights)
    selected = [bool(is_selected[p]) for p in places]
    slow = reference.sampling_loss([logits[p] for p in places], selected)
    assert_same_loss(losses.sampling_loss(logits, is_selected, weights), slow, logits)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("n", "b", "r"), SIZES)
def test_sampling_accuracy_is_the_share_of_selections_foreseen(n, b, r, padded):
    logits, weights = random_logits(n, b), random_weights(n, b, padded)
    is_selected = random_logits(n, b, seed=1) > 0
    places = counted_places(n, b, weights)
    hits = sum(bool((logits[p] > 0) == is_selected[p]) for p in places)
    accuracy = losses.sampling_accuracy(logits, is_selected, weights)
    assert accuracy.item() == pytest.approx(hits / max(1, len(places)))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("n", "b", "r"), SIZES)
def test_balancing_loss_multiplies_mean_probability_and_share_of_each_depth(n, b, r, padded):
    logits, weights = random_logits(n, b, r), random_weights(n, b, padded)
    probabilities = logits.softmax(dim=-1)
    depth = random_logits(n, b, r, seed=1).argmax(dim=-1)
    is_depth = torch.nn.functional.one_hot(depth, r).bool()
    places = counted_places(n, b, weights)
    slow = reference.balancing_loss(
        [probabilities[p] for p in places], [int(depth[p]) for p in places], r
    )
    assert_same_loss(losses.balancing_loss(probabilities, is_depth, weights), slow, probabilities)


def test_balancing_loss_is_one_when_depths_are_chosen_evenly():
    is_depth = torch.eye(3).bool()[:, None]
    probabilities = torch.full((3, 1, 3), 1 / 3)
    assert losses.balancing_loss(probabilities, is_depth).item() == pytest.approx(1.0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("n", "b", "r"), SIZES)
def test_z_loss_is_the_mean_squared_log_partition(n, b, r, padded):
    logits, weights = random_logits(n, b, r), random_weights(n, b, padded)
    slow = reference.z_loss([logits[p] for p in counted_places(n, b, weights)])
    assert_same_loss(losses.z_loss(logits, weights), slow, logits)


def test_what_stands_in_padding_does_not_reach_a_mean():
    values = torch.tensor([[1.0, torch.inf], [torch.nan, 2.0]])
    weights = columns([1, 0], [0, 1]).float()
    assert losses.masked_mean(values, weights).item() == 1.5


def test_the_mean_of_nothing_is_zero_and_has_a_zero_gradient():
    logits = random_logits(3, 2)
    loss = losses.sampling_loss(logits, torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3, 2))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()
