"""Matrix products of a model that serves: fewer and larger ones, by the fastest library at hand.

Decoding spends nearly all of its time here. Projections of the same rows (query, key and value; gate and
up) become one product with their concatenated weights. On CPUs, oneDNN computes it. Where PyTorch's
default library leaves half of the vector unit idle, as MKL does on AMD processors with AVX-512, oneDNN
takes less than half of the time, and again 10 to 40 % less if weights are reordered into blocks
beforehand. Its two operators are those that TorchInductor calls.

    PackedProducts   copies of the weights, concatenated and reordered: the fastest, for engines
    Products         the parameters themselves, one product for each: no copies

Projections that are neither of ours, such as adapters of another library or quantized weights, run as
the modules that they are.

Legend: `t` tokens in flight, `i` inputs and `o` outputs of a projection, `h` hidden.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mor_layers.cpu_kernels import swiglu
from mor_layers.generation.watched import WatchedParameters
from mor_layers.layers import (
    Assignment,
    Experts,
    Projected,
    RelaxedLinear,
    StepLinear,
    run_projection,
    weights_of,
)
from mor_layers.recursion import StepContext

TYPICAL_ROWS = 64
"""Rows of a product that the reordered layout is chosen for. It hardly depends on them."""


def has_onednn(weight: Tensor) -> bool:
    """Whether oneDNN can multiply by a weight at full speed."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def multiply(
    hidden: Float[Tensor, "... i"], weight: Tensor, bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "... o"]:
    """`F.linear` without gradients. `weight` is `[o i]`, or the result of `reordered`."""
    if weight.is_mkldnn or has_onednn(weight):
        return torch.ops.mkldnn._linear_pointwise.default(hidden, weight, bias, "none", [], "")
    return F.linear(hidden, weight, bias)


def reordered(weight: Float[Tensor, "o i"]) -> Tensor:
    """The weight in the layout that `multiply` reads fastest, and that nothing else can read."""
    if has_onednn(weight):
        return torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
    return weight


class Products:
    """Products with the parameters of a model, in place."""

    def refresh(self) -> None:
        """Take notice of parameters that have changed. Called before each pass."""
        return

    def __call__(
        self,
        projections: tuple[Projected, ...],
        hidden: Float[Tensor, "t 1 i"],
        context: StepContext | None,
    ) -> tuple[Float[Tensor, "t 1 o"], ...]:
        """Each projection of `hidden`, whose rows may be at different steps.

        Args:
            context: says which ones; None for a projection outside of the recursion.
        """
        return tuple(self._single(projection, hidden, context) for projection in projections)

    def expert(
        self, experts: Experts, index: int, hidden: Float[Tensor, "t h"]
    ) -> Float[Tensor, "t h"]:
        """The output of one expert."""
        gate, up = (multiply(hidden, weight[index]) for weight in (experts.gate, experts.up))
        return multiply(swiglu(gate, up), experts.down[index])

    def chosen_experts(
        self, experts: Experts, hidden: Float[Tensor, "t h"], assignment: Assignment
    ) -> Float[Tensor, "t h"] | None:
        """The output of a mixture, as one operation of a graph; None if there is no such operation."""
        return None

    @staticmethod
    def _single(projection: Projected, hidden: Tensor, context: StepContext | None) -> Tensor:
        if not is_known(projection):
            return run_projection(projection, hidden, context)
        steps = list(zip(weights_of(projection), _biases_of(projection), strict=True))
        return completed(projection, hidden, _product(steps, hidden, context), context)


class PackedProducts(Products):
    """Products with copies of the weights, each of which is made when it is first needed.

    The copies are made again after a parameter of the model has changed, in place or by replacement. A
    change that bypasses PyTorch's version counter (`parameter.data.copy_(...)`) is not seen.

    Args:
        model: whatever holds all projections.
    """

    def __init__(self, model: nn.Module) -> None:
        self._packed: dict[tuple[object, ...], Packed] = {}
        self._parameters = WatchedParameters(model)

    def refresh(self) -> None:
        if self._parameters.have_changed():
            self._packed.clear()

    def __call__(
        self, projections: tuple[Projected, ...], hidden: Tensor, context: StepContext | None
    ) -> tuple[Tensor, ...]:
        packed = self.packed(projections)
        if packed is None:
            return super().__call__(projections, hidden, context)
        joined = _product(packed.steps, hidden, context)
        outputs = (joined,) if len(projections) == 1 else joined.split(packed.widths, dim=-1)
        return tuple(
            completed(projection, hidden, output, context)
            for projection, output in zip(projections, outputs, strict=True)
        )

    def packed(self, projections: tuple[Projected, ...]) -> "Packed | None":
        """The copies for some projections; None if one of them must run as the module that it is."""
        packed = self._packed.get(projections)
        if packed is None:
            if not all(is_known(projection) for projection in projections):
                return None
            weights = zip(*(weights_of(projection) for projection in projections), strict=True)
            biases = zip(*(_biases_of(projection) for projection in projections), strict=True)
            packed = self._packed[projections] = Packed(list(weights), list(biases))
        return packed

    def expert(self, experts: Experts, index: int, hidden: Tensor) -> Tensor:
        packed = self._packed.get((experts, index))
        if packed is None:
            into = experts.gate[index], experts.up[index]
            packed = self._packed[experts, index] = Packed([into, (experts.down[index],)])
        (into, _), (out, _) = packed.steps
        gate, up = multiply(hidden, into).split(packed.widths, dim=-1)
        return multiply(swiglu(gate, up), out)


class Packed:
    """Several weights that become one product; once, or for each step.

    Attributes:
        widths: number of outputs of each projection.
        steps: for each step, the joined weight and bias, as `multiply` takes them.

    Args:
        weights: those of each step, `[o i]`.
        biases: theirs. Default: none.
    """

    def __init__(
        self,
        weights: Sequence[tuple[Tensor, ...]],
        biases: Sequence[tuple[Tensor | None, ...]] | None = None,
    ) -> None:
        self.widths = [len(weight) for weight in weights[0]]
        self.steps: list[tuple[Tensor, Tensor | None]] = []
        for own, their_biases in zip(weights, biases or [()] * len(weights), strict=True):
            self.steps.append((reordered(torch.cat(own).detach()), _joined(own, their_biases)))


def _joined(weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> Tensor | None:
    """One bias for all; zeros where there is none."""
    if all(bias is None for bias in biases):
        return None
    parts = zip(weights, biases, strict=True)
    return torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in parts]).detach()


def _product(
    steps: Sequence[tuple[Tensor, Tensor | None]], hidden: Tensor, context: StepContext | None
) -> Tensor:
    """The product with the weight of all steps, or of each row's step."""
    if len(steps) == 1:
        return multiply(hidden, *steps[0])
    assert context is not None
    return context.at_each_step(
        len(hidden), lambda step, rows: multiply(hidden[rows], *steps[step])
    )


def is_known(projection: nn.Module) -> bool:
    """Whether a projection is the product with its weight, and what `completed` adds."""
    if type(projection) not in (nn.Linear, RelaxedLinear, StepLinear):
        return False
    return all(type(weight) in (Tensor, nn.Parameter) for weight in weights_of(projection))


def _biases_of(projection: Projected) -> list[Tensor | None]:
    """The biases that belong to `weights_of`; a `RelaxedLinear` adds its own after the deltas."""
    if isinstance(projection, StepLinear):
        return list(projection.biases) or [None] * len(projection.weights)
    return [None if isinstance(projection, RelaxedLinear) else projection.bias]


def completed(
    projection: Projected, hidden: Tensor, output: Tensor, context: StepContext | None
) -> Tensor:
    """What the module makes of its product: deltas, and hooks, which sum over ranks."""
    if isinstance(projection, RelaxedLinear):
        assert context is not None
        output = projection.relaxed(hidden, output, context)
    for hook in projection._forward_hooks.values():
        changed = hook(projection, (hidden,), output)
        output = output if changed is None else changed
    return output
