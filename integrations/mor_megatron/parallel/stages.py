"""Division of a model over pipeline stages, without splitting a part such as a recursion."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from mor_layers import RecursionConfig


def blocks_per_part(recursion: RecursionConfig, num_blocks: int) -> int:
    """How many of a recursion's blocks, one after another, no stage may separate.

    With `depth_balance`, layers tell the next ones which tokens they ran, until an anchor at which
    counting begins anew. Stages send hidden states only.
    """
    if recursion.depth_balance is None:
        return 1
    return recursion.anchor_every or num_blocks


def even_stages(depths: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    """Divide consecutive parts into stages so that the deepest stage is as shallow as possible.

    Args:
        depths: number of unrolled layers of each part.
        size: number of stages. No stage is empty.

    Returns:
        The depths of the parts of each stage. Among equally good divisions, this is the one whose
        first stages have the fewest parts.

    Raises:
        ValueError: there are more stages than parts.
    """
    if not 1 <= size <= len(depths):
        raise ValueError(
            f"{size} pipeline stages cannot divide the {len(depths)} parts of the model "
            f"({', '.join(map(str, depths))} unrolled layers), because a recursion must stay within "
            f"one stage. Use between 1 and {len(depths)} stages."
        )
    return _divided(tuple(depths), size)


@cache
def _divided(depths: tuple[int, ...], size: int) -> tuple[tuple[int, ...], ...]:
    count, sums = len(depths), [0, *accumulate(depths)]
    # Dynamic programming over the parts from i to the end: the depth of the deepest stage if they are
    # divided into a given number of stages, and the end of the first of these stages. Trying all
    # divisions would take minutes for a hundred layers.
    deepest, cuts = [sums[-1] - before for before in sums], [[count] * count]
    for stages in range(2, size + 1):
        own = [_first_cut(sums, deepest, i, count - stages + 1) for i in range(count - stages + 1)]
        deepest = [max(sums[cut] - sums[i], deepest[cut]) for i, cut in enumerate(own)]
        cuts.append(own)
    divided, begin = [], 0
    for own in reversed(cuts):
        divided.append(depths[begin : own[begin]])
        begin = own[begin]
    return tuple(divided)


def _first_cut(sums: list[int], rest: list[int], begin: int, last: int) -> int:
    """The first of the best ends of a stage that starts at `begin` and ends no later than `last`.

    Args:
        sums: number of layers before each part.
        rest: depth of the deepest later stage, by the part where the later stages start.
    """
    # A later end makes this stage deeper and the later ones shallower, so the best end is where the
    # two depths cross. A binary search finds it.
    ends = range(begin + 1, last + 1)
    own = bisect_left(ends, True, key=lambda end: sums[end] - sums[begin] >= rest[end])
    is_later_better = own < len(ends) and (
        own == 0 or sums[ends[own]] - sums[begin] < rest[ends[own - 1]]
    )
    if is_later_better:
        return ends[own]
    best = rest[ends[own - 1]]
    return ends[bisect_left(ends, True, key=lambda end: rest[end] <= best)]
