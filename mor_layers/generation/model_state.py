"""Notices that a model computes something else than before."""

from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, nn

from mor_layers.routers import Router

Members = dict[str, Any]
"""A module's parameters, buffers, submodules or attributes, by name."""


class ModelState:
    """What the outputs of a model depend on, as it was when this was last asked.

    Seen are parameters, buffers (among them calibrated thresholds) and modules, changed in place or
    replaced, and the plain settings of routers (among them the dial and the criterion of early exit). A
    change that bypasses PyTorch's version counter (`parameter.data.copy_(...)`) is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._note()

    def has_changed(self) -> bool:
        """Whether the model has changed since the last call, or since this object was made."""
        has_changed = not self._is_unchanged()
        if has_changed:
            self._note()
        return has_changed

    def _is_unchanged(self) -> bool:
        # Plain loops: this runs for every request.
        for members, name, tensor, address, version in self._tensors:
            if members.get(name) is not tensor or tensor.data_ptr() != address:
                return False
            if version is not None and tensor._version != version:
                return False
        for members, name, module in self._modules:
            if members.get(name) is not module:
                return False
        return all(members.get(name) == value for members, name, value in self._settings)

    def _note(self) -> None:
        self._tensors: list[tuple[Members, str, Tensor, int, int | None]] = []
        self._modules: list[tuple[Members, str, nn.Module | None]] = []
        self._settings: list[tuple[Members, str, Any]] = []
        for module in self._model.modules():
            self._modules += [(module._modules, *child) for child in module._modules.items()]
            for members in (module._parameters, module._buffers):
                for name, tensor in members.items():
                    if tensor is not None:
                        version = None if tensor.is_inference() else tensor._version
                        self._tensors.append((members, name, tensor, tensor.data_ptr(), version))
        routers = (module for module in self._model.modules() if isinstance(module, Router))
        for module in {part for router in routers for part in router.modules()}:
            self._settings += [
                (vars(module), name, value)
                for name, value in vars(module).items()
                if name[0] != "_" and _is_plain(value)
            ]


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str | tuple) or is_dataclass(value)
