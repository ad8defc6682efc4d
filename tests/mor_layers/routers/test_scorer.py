"""What turns scores into a choice."""

import pytest
import torch

from mor_layers.routers.scorer import bar_above


@pytest.mark.parametrize(("count", "above"), [(0, 0), (1, 1), (2.4, 2), (2.6, 3), (5, 5), (9, 5)])
def test_as_many_values_lie_above_the_bar_as_were_asked_for(count, above):
    values = torch.tensor([3.0, -1.0, 2.0, 7.0, 5.0])
    assert int((values > bar_above(values, count)).sum()) == above


def test_the_bar_lies_halfway_between_two_neighbours():
    assert bar_above(torch.tensor([3.0, -1.0, 2.0, 7.0, 5.0]), 2) == 4.0
