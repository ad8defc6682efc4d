"""What tests of ticks as graphs share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """The function that would be compiled runs as it is."""
    with torch.compiler.set_stance("force_eager"):
        yield
