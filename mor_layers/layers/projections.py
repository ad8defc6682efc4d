"""Projections of layers that run several times: shared by all steps, relaxed, or one for each step.

    shared     y = W x                        one nn.Linear
    relaxed    y = W x + scale · B_r A_r x    a shared weight and a delta for each step, `relaxation`
    own        y = W_r x                      a weight for each step

What steps share is a choice for each sublayer (`RecursionConfig.own_per_step`). SMELT (arXiv
2609.01343) loops the middle half of a mixture of experts twice; experts take most of the parameters
and the work of telling loops apart, so they are what is worth sharing, and attention is small enough
for each loop to have its own.

Legend: `b` batch, `k` tokens that run a step, `i` inputs and `o` outputs of a projection.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mor_layers.layers.relaxation import MLP_PROJECTIONS, Projection, Relaxation, RelaxedLinear
from mor_layers.recursion import StepContext

Sublayer = Literal["attention", "mlp"]
SUBLAYERS: tuple[Sublayer, ...] = get_args(Sublayer)
ATTENTION_PROJECTIONS: tuple[Projection, ...] = ("query", "key", "value", "output")
PROJECTIONS_OF: dict[Sublayer, tuple[Projection, ...]] = {
    "attention": ATTENTION_PROJECTIONS,
    "mlp": MLP_PROJECTIONS,
}


class StepLinear(nn.Module):
    """A projection of which each step has its own, with normally distributed weights."""

    def __init__(self, into: int, out: int, bias: bool, num_steps: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(out, into)) for _ in range(num_steps)
        )
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(out)) for _ in range(num_steps * bias)
        )
        for weight in self.weights:
            if not weight.is_meta:  # where drawing is slow, and draws nothing
                nn.init.normal_(weight, std=0.02)

    def forward(
        self, hidden: Float[Tensor, "k b i"], context: StepContext
    ) -> Float[Tensor, "k b o"]:
        def run(step: int, rows: slice) -> Tensor:
            bias = self.biases[step] if self.biases else None
            return F.linear(hidden[rows], self.weights[step], bias)

        return context.at_each_step(len(hidden), run)


Projected = nn.Linear | StepLinear


def make_projection(
    name: Projection,
    into: int,
    out: int,
    relaxation: Relaxation | None,
    num_steps: int,
    bias: bool = False,
    own: tuple[Projection, ...] = (),
) -> Projected:
    """The projection `name` of a layer that runs in `num_steps` steps.

    Args:
        own: projections of which each step has its own.
    """
    if name in own:
        return StepLinear(into, out, bias, num_steps)
    if relaxation is None or name not in relaxation.projections:
        return nn.Linear(into, out, bias=bias)
    return RelaxedLinear(into, out, bias, relaxation, num_steps)


def project(
    projections: tuple[Projected, ...], hidden: Float[Tensor, "k b i"], context: StepContext
) -> tuple[Float[Tensor, "k b o"], ...]:
    """Each projection of `hidden`, each row as at its step."""
    if context.products is not None:
        return context.products(projections, hidden, context)
    return tuple(run_projection(projection, hidden, context) for projection in projections)


def run_projection(projection: Projected, hidden: Tensor, context: StepContext | None) -> Tensor:
    """One projection, computed by its module. A projection outside of the layers has no context."""
    if isinstance(projection, StepLinear | RelaxedLinear):
        assert context is not None
        return projection(hidden, context)
    return projection(hidden)


def weights_of(linear: Projected) -> list[Tensor]:
    """The weight of each step, or the one of all steps; without deltas."""
    return list(linear.weights) if isinstance(linear, StepLinear) else [linear.weight]
