"""WatchedParameters: notices that a model's parameters have changed since something was made of them."""

from typing import NamedTuple

from torch import Tensor, nn

UNKNOWN = -1
"""Version of a tensor that does not count its changes."""


class _Seen(NamedTuple):
    """A parameter as it was."""

    owner: dict[str, nn.Parameter | None]
    name: str
    parameter: nn.Parameter
    address: int
    version: int


class WatchedParameters:
    """The parameters of a model, as they were when `have_changed` was last asked.

    Changes in place and replaced parameters are noticed. A change that bypasses PyTorch's version
    counter (`parameter.data.copy_(...)`) is not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen = _seen(model)

    def have_changed(self) -> bool:
        """Whether any parameter has changed since the last call."""
        if _are_unchanged(self._seen):
            return False
        self._seen = _seen(self._model)
        return True


def _seen(model: nn.Module) -> list[_Seen]:
    return [
        _Seen(module._parameters, name, parameter, parameter.data_ptr(), _version(parameter))
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _are_unchanged(seen: list[_Seen]) -> bool:
    # A plain loop: it runs in every tick, over every parameter.
    for owner, name, parameter, address, version in seen:
        if owner.get(name) is not parameter or parameter.data_ptr() != address:
            return False
        if version != UNKNOWN and parameter._version != version:
            return False
    return True


def _version(tensor: Tensor) -> int:
    """How often the tensor was changed in place, which one made in inference mode does not know."""
    return UNKNOWN if tensor.is_inference() else tensor._version
