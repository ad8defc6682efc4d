"""Constraints: which tokens may come next in a text that must follow a grammar.

The engine knows no grammar. Whoever sends a request gives it a `Constraint`.
`mor_tools.serving.calls.grammars` makes them with the library llguidance.

Legend: `b` requests, `v` vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Constraint(Protocol):
    """The state of one text in its grammar. It belongs to one request."""

    def allowed(self) -> Bool[Tensor, " v"]:
        """Which tokens may come next."""
        ...

    def accept(self, token: int) -> bool:
        """Add a token to the text, and return whether the text is complete, so that none may follow.

        Raises:
            ValueError: the token is not allowed, or the grammar is too complex to go on.
        """
        ...


def constrained(
    logits: Float[Tensor, "b v"], constraints: Sequence[Constraint | None]
) -> tuple[Float[Tensor, "b v"], dict[int, str]]:
    """The logits with -inf for tokens that are not allowed. They are not copied without constraints.

    Returns:
        The logits, and by row the reason why no token may come next. Such a row is all -inf.
    """
    rows = {row: c for row, c in enumerate(constraints) if c is not None}
    if not rows:
        return logits, {}
    logits, problems = logits.clone(), {}
    for row, constraint in rows.items():
        try:
            allowed = constraint.allowed().to(logits.device)
            if not bool(allowed.any()):
                problems[row] = "the grammar of this request allows no further token"
        except Exception as error:  # an error of one grammar must not end other requests
            allowed = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            problems[row] = f"the grammar of this request failed: {error}"
        logits[row] = logits[row].where(allowed, -torch.inf)
    return logits, problems
