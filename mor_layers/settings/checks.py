"""Checks that several settings classes share. Each error says what was given and what is allowed."""

import math


def require_choice(owner: str, field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError if `value` is not one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{owner}.{field}={value!r} is unknown. Use one of {', '.join(allowed)}.")


def require_positive(owner: str, **values: float) -> None:
    """Raise ValueError if a value is not above 0 and finite."""
    for field, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{owner}.{field}={value} must be above 0, and finite.")


def require_not_negative(owner: str, **values: float) -> None:
    """Raise ValueError if a value is below 0 or not finite."""
    for field, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{owner}.{field}={value} must be 0 or more, and finite.")
