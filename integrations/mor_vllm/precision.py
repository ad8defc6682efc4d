"""The precision of parameters and buffers while vLLM builds a model of lower precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_fp32() -> Iterator[None]:
    """A context in which parameters and buffers are created in fp32, the precision in which routers
    score.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
