"""DTensor parameters that modules read as plain tensors, so that the modules know nothing of ranks.

`module.weight` is this rank's part, while `module.parameters()` and the state dict have the DTensor,
which FSDP2, gradient clipping, the optimizer and checkpoints need.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import Placement


def read_locally(module: nn.Module, gradients: Mapping[str, Placement]) -> None:
    """Let a module read its own parameters, DTensors over one mesh dimension, as plain tensors.

    Args:
        gradients: for each parameter, which part of its gradient this rank's backward pass computes.
    """
    module.__class__ = _reader(type(module), tuple(gradients))
    object.__setattr__(module, "_gradient_placements", gradients)


@cache
def _reader(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of a module's class with a property for each parameter."""

    def reading(name: str) -> property:
        def local(module: Any) -> Tensor:
            parameter = module._parameters[name]
            if parameter.device_mesh.ndim > 1:  # a shard, which FSDP2 looks at between passes
                return parameter
            return parameter.to_local(grad_placements=[module._gradient_placements[name]])

        return property(local)

    return type(kind.__name__, (kind,), {name: reading(name) for name in names})
