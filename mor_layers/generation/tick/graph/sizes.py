"""The sizes of a graph's tensors.

A CPU runs a graph with symbolic sizes, so rows are hardly padded at all. On a GPU, each combination of
sizes is a recorded graph of its own, so there are few of them.
"""

FEWEST = 2
"""Smallest size, because the compiler makes special cases of 0 and 1."""

FINEST = 4
"""Smallest size of recorded graphs. Further sizes are multiples of it."""


def padded_size(count: int, has_few: bool) -> int:
    """The size that `count` rows are padded to.

    Args:
        has_few: whether there should be few sizes: at most one row in 16 is padding, or fewer than
            `FINEST` rows are.
    """
    if not has_few:
        return max(FEWEST, count)
    step = max(FINEST, 1 << max(0, count.bit_length() - 5))
    return max(FINEST, -(-count // step) * step)
