"""PackedInGraph: products with packed weights, as operations that a compiler leaves as they are.

On CPUs the packed weights of `products` are in a layout that only oneDNN reads, and no compiler takes
them as inputs of a graph. The operations find them by number when the graph runs, so copies that have
been made again need no new graph. A mixture of experts is one operation, inside which only the chosen
ones run.

Legend: `t` rows, `i` inputs and `o` outputs of a projection.
"""

from itertools import count
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mor_layers.generation.products import (
    PackedProducts,
    Products,
    completed,
    is_known,
    multiply,
)
from mor_layers.layers import (
    Assignment,
    Experts,
    Projected,
    StepLinear,
    run_projection,
    weights_of,
)
from mor_layers.recursion import StepContext


class PackedInGraph(Products):
    """Products with the weights that the engine has packed.

    Args:
        products: holds the packed weights.
        model: whatever holds all projections.
    """

    def __init__(self, products: PackedProducts, model: nn.Module) -> None:
        self.products = products
        self.projections = [
            module
            for module in model.modules()
            if isinstance(module, nn.Linear | StepLinear) and is_known(module)
        ]
        self.indices = {module: index for index, module in enumerate(self.projections)}
        self.widths = {module: len(weights_of(module)[0]) for module in self.projections}
        self.mixtures = [module for module in model.modules() if isinstance(module, Experts)]
        self.mixture_indices = {module: index for index, module in enumerate(self.mixtures)}
        self.number = next(_NUMBERS)
        _PRODUCTS[self.number] = self

    def __call__(
        self,
        projections: tuple[Projected, ...],
        hidden: Float[Tensor, "t 1 i"],
        context: StepContext | None,
    ) -> tuple[Float[Tensor, "t 1 o"], ...]:
        if any(projection not in self.indices for projection in projections):
            if len(projections) == 1:
                return (run_projection(projections[0], hidden, context),)
            return tuple(self((projection,), hidden, context)[0] for projection in projections)
        indices = [self.indices[projection] for projection in projections]
        widths = [self.widths[projection] for projection in projections]

        def product(step: int) -> Tensor:
            at = self.number, indices, step, sum(widths)
            return torch.ops.mor_layers.packed_product(hidden, *at)

        if context is not None and isinstance(projections[0], StepLinear):
            joined = context.at_each_step(len(hidden), lambda step, rows: product(step))
        else:
            joined = product(0)
        return tuple(
            completed(projection, hidden, output, context)
            for projection, output in zip(projections, joined.split(widths, dim=-1), strict=True)
        )

    def expert(
        self, experts: Experts, index: int, hidden: Float[Tensor, "t h"]
    ) -> Float[Tensor, "t h"]:
        at = self.number, self.mixture_indices[experts], index
        return torch.ops.mor_layers.one_expert(hidden, *at)

    def chosen_experts(
        self, experts: Experts, hidden: Float[Tensor, "t h"], assignment: Assignment
    ) -> Float[Tensor, "t h"]:
        at = self.number, self.mixture_indices[experts]
        given = assignment.experts, assignment.gates, assignment.is_taken
        return torch.ops.mor_layers.chosen_experts(hidden, *given, *at)


_NUMBERS = count()
_PRODUCTS: WeakValueDictionary[int, PackedInGraph] = WeakValueDictionary()
"""An operation gets tensors and numbers only, and finds its weights here."""

_LIBRARY = torch.library.Library("mor_layers", "FRAGMENT")
_LIBRARY.define(
    "packed_product(Tensor hidden, int products, int[] projections, int step, int width) -> Tensor"
)
_LIBRARY.define(
    "chosen_experts(Tensor hidden, Tensor experts, Tensor gates, Tensor is_taken, int products, "
    "int mixture) -> Tensor"
)
_LIBRARY.define("one_expert(Tensor hidden, int products, int mixture, int index) -> Tensor")


def _one_expert(hidden: Tensor, products: int, mixture: int, index: int) -> Tensor:
    found = _PRODUCTS[products]
    return found.products.expert(found.mixtures[mixture], index, hidden)


def _chosen_experts(
    hidden: Tensor,
    experts: Tensor,
    gates: Tensor,
    is_taken: Tensor,
    products: int,
    mixture: int,
) -> Tensor:
    found = _PRODUCTS[products]
    assignment = Assignment(experts, gates, is_taken)
    return found.mixtures[mixture](hidden, assignment, found.products)


def _packed_product(
    hidden: Tensor, products: int, projections: list[int], step: int, width: int
) -> Tensor:
    found = _PRODUCTS[products]
    packed = found.products.packed(tuple(found.projections[i] for i in projections))
    assert packed is not None
    return multiply(hidden, *packed.steps[step])


def _fake_product(
    hidden: Tensor, products: int, projections: list[int], step: int, width: int
) -> Tensor:
    return hidden.new_empty(*hidden.shape[:-1], width)


_LIBRARY.impl("packed_product", _packed_product, "CPU")
_LIBRARY.impl("chosen_experts", _chosen_experts, "CPU")
_LIBRARY.impl("one_expert", _one_expert, "CPU")
for _name in ("chosen_experts", "one_expert"):
    torch.library.register_fake(
        f"mor_layers::{_name}", lambda hidden, *given: torch.empty_like(hidden)
    )
torch.library.register_fake("mor_layers::packed_product", _fake_product)
