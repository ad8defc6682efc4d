"""How many tokens of a document a share of it is: the one place where this is computed."""

import math

import torch
from jaxtyping import Int
from torch import Tensor


def capacity(share: float, length: int, multiple: int = 1) -> int:
    """Number of tokens that `share` of `length` tokens is.

    It is `floor(share · length)` and at least 1, rounded up to a multiple, and never more than `length`.
    Up, because a matrix product computes its last tile whether or not rows fill it: what is added is
    free, and no document loses its last token.

    Args:
        share: in (0, 1].
        length: tokens of the document, at least 1.
        multiple: what the number is a multiple of, unless it is `length`. At least 1.
    """
    tokens = max(1, math.floor(share * length))
    return min(length, -(-tokens // multiple) * multiple)


def capacities(share: float, lengths: Int[Tensor, "..."], multiple: int = 1) -> Int[Tensor, "..."]:
    """The same for a tensor of lengths. A length of 0, as padding has, gives 0."""
    # float64, so that share · length is rounded as Python rounds it.
    tokens = (lengths.double() * share).floor().clamp(min=1).to(torch.int64)
    rounded = (tokens + multiple - 1).div(multiple, rounding_mode="floor") * multiple
    return rounded.minimum(lengths)
