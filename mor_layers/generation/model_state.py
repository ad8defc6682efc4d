"""Notices that a model computes something else than before."""

from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, nn

from mor_layers.models import MoRTransformer


class ModelState:
    """What a model's outputs depend on, as it was when this was last asked.

    Seen are parameters, buffers (among them calibrated thresholds) and modules, changed in place or
    replaced, and the plain settings of routers (among them the dial and the criterion of early exit). A
    change that bypasses PyTorch's version counter (`parameter.data.copy_(...)`) is not seen.
    """

    def __init__(self, model: MoRTransformer) -> None:
        self._model = model
        self._state = self._now()

    def has_changed(self) -> bool:
        """Whether the model has changed since the last call, or since this object was made."""
        state = self._now()
        # Whatever is compared by identity is also held, so that no later object can take its place.
        is_same = len(state) == len(self._state) and all(
            now is before or (type(now) is type(before) and not _by_identity(now) and now == before)
            for now, before in zip(state, self._state, strict=True)
        )
        self._state = state
        return not is_same

    def _now(self) -> list[Any]:
        state: list[Any] = []
        for module in self._model.modules():
            state.append(module)
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None:
                        version = -1 if tensor.is_inference() else tensor._version
                        state += (tensor, tensor.data_ptr(), version)
        for block in self._model.recursions:
            for module in block.router.modules():
                state += [v for k, v in vars(module).items() if k[0] != "_" and _is_plain(v)]
        return state


def _by_identity(value: object) -> bool:
    return isinstance(value, Tensor | nn.Module)


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str | tuple) or is_dataclass(value)
