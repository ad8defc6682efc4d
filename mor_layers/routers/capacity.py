"""Capacity factors: the share of the tokens that run each step."""

from itertools import pairwise


def default_capacity_factors(num_recursions: int) -> tuple[float, ...]:
    """`(N_r - r + 1) / N_r` for r = 1 .. N_r."""
    return tuple((num_recursions - r) / num_recursions for r in range(num_recursions))


def checked_capacity_factors(
    factors: tuple[float, ...] | None, num_recursions: int
) -> tuple[float, ...]:
    """The factors, or the default ones if `None` is given.

    Raises:
        ValueError: their number is not `num_recursions`, one is outside (0, 1], or one is larger
            than the one before.
    """
    if factors is None:
        return default_capacity_factors(num_recursions)
    advice = f"Use {num_recursions} non-increasing numbers in (0, 1], or leave it out."
    if len(factors) != num_recursions:
        raise ValueError(
            f"capacity_factors={factors} has {len(factors)} entries for {num_recursions} "
            f"recursions. {advice}"
        )
    if not all(0.0 < factor <= 1.0 for factor in factors):
        raise ValueError(f"capacity_factors={factors} has an entry outside (0, 1]. {advice}")
    if any(later > earlier for earlier, later in pairwise(factors)):
        raise ValueError(
            f"capacity_factors={factors} increase, but a token that left cannot return. {advice}"
        )
    return tuple(factors)
