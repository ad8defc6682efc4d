"""The small network that scores tokens.

Legend: `b` batch, `n` candidates of a step, `h` hidden, `c` logits per token.
"""

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mor_layers.modules import CalledParameters
from mor_layers.routers.declarations import ScorerMatrix


class Scorer(nn.Module):
    """Logits of tokens from their hidden states, computed in fp32: `h → out` or `h → 2h → out`.

    Neither form has biases (arXiv 2507.10524, table 5), unless the last layer's bias is given an
    initial value.
    """

    def __init__(
        self, architecture: str, hidden_size: int, num_logits: int, bias: float | None = None
    ) -> None:
        super().__init__()
        self.first_bias = bias
        sizes = [hidden_size, num_logits]
        if architecture == "mlp":
            sizes.insert(1, 2 * hidden_size)
        self.weights = CalledParameters(
            nn.Parameter(torch.empty(out, into)) for into, out in pairwise(sizes)
        )
        self.bias = None if bias is None else nn.Parameter(torch.empty(num_logits))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from a normal distribution with std 0.02, as the published code does."""
        for weight in self.weights:
            nn.init.normal_(weight, std=0.02)
        if self.bias is not None and self.first_bias is not None:
            nn.init.constant_(self.bias, self.first_bias)

    def forward(
        self, hidden: Float[Tensor, "n b h"], temperature: float = 1.0
    ) -> Float[Tensor, "n b c"]:
        """Logits of the states, which are divided by a temperature first."""
        values = hidden.float() if temperature == 1.0 else (hidden / temperature).float()
        for i in range(len(self.weights)):
            if i:
                values = nn.functional.gelu(values)
            values = nn.functional.linear(values, self.weights(i).float())
        return values if self.bias is None else values + self.bias.float()


def bar_above(values: Float[Tensor, " t"], count: float) -> float:
    """A number that `count` (rounded) of the values exceed, halfway between two neighbouring
    values.
    """
    kept = min(len(values), max(0, round(count)))
    if kept == 0:
        return torch.finfo(torch.float32).max
    if kept == len(values):
        return torch.finfo(torch.float32).min
    ordered = values.double().sort(descending=True).values
    return float(ordered[kept - 1] + ordered[kept]) / 2


def scorer_matrices(
    architecture: str, hidden_size: int, num_logits: int
) -> tuple[ScorerMatrix, ...]:
    """The matrices by which a `Scorer` multiplies a token."""
    if architecture == "linear":
        return (ScorerMatrix(hidden_size * num_logits),)
    inner = 2 * hidden_size
    return ScorerMatrix(hidden_size * inner), ScorerMatrix(inner * num_logits)


def published_scorer(
    ours: str, entry: int, theirs: str, architecture: str
) -> dict[str, tuple[int, str]]:
    """The names of a `Scorer`'s matrices in published checkpoints (see `PublishedRouter.names`).

    Args:
        ours: name of the scorer in our router.
        entry: index of its entry in the list of layers, counted from the recursion's first entry.
        theirs: name of the published router in that entry.
        architecture: architecture of the scorer.
    """
    layers = ("router",) if architecture == "linear" else ("router.0", "router.2")
    return {
        f"{ours}.weights.{i}": (entry, f"{theirs}.{layer}.weight") for i, layer in enumerate(layers)
    }


def require_gates(
    owner: str, bias: float | None, combine: str, activation: str = "sigmoid"
) -> None:
    """Raise ValueError if a bias of gates is not finite, or if there are no gates to apply it to."""
    if bias is None:
        return
    if not math.isfinite(bias):
        raise ValueError(f"{owner}.gate_bias={bias} must be finite.")
    if combine == "additive" or activation == "softmax":
        given = "combine='additive'" if combine == "additive" else "activation='softmax'"
        raise ValueError(
            f"{owner}.gate_bias={bias} has no effect with {given}. Leave it out, or use "
            "combine='weighted' with activation='sigmoid'."
        )
