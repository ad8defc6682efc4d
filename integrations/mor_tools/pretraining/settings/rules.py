"""Checks of settings, whose errors say what was given and what is allowed."""

import math


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message if the condition does not hold."""
    if not condition:
        raise ValueError(message)


def require_at_least(minimum: float, owner: str, **values: float | None) -> None:
    """Raise ValueError if a value is below `minimum` or not finite; None is allowed."""
    for name, value in values.items():
        if value is not None and not value >= minimum:
            raise ValueError(f"{owner}.{name}={value} must be at least {minimum}.")
        if value == math.inf:
            raise ValueError(f"{owner}.{name}={value} must be finite, and at least {minimum}.")


def require_at_most(maximum: int, owner: str, **values: int | None) -> None:
    """Raise ValueError if a value is above `maximum`; None is allowed."""
    for name, value in values.items():
        if value is not None and value > maximum:
            raise ValueError(f"{owner}.{name}={value} must be at most {maximum}.")


def require_share(owner: str, **values: float) -> None:
    """Raise ValueError if a value is not strictly between 0 and 1."""
    for name, value in values.items():
        if not 0.0 < value < 1.0:
            raise ValueError(f"{owner}.{name}={value} must lie in (0, 1).")
