"""What tests of ticks as graphs share."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mor_layers.generation.tick.graph import StaticTick


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """The function that would be compiled runs as it is."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that a GPU records runs on the CPU: few sizes, and rows of the cache are copied."""
    begin = StaticTick.__init__

    def in_few_sizes(self: StaticTick, *given: Any) -> None:
        begin(self, *given, reads_in_place=False)
        self.has_few_sizes = True

    monkeypatch.setattr(StaticTick, "__init__", in_few_sizes)
