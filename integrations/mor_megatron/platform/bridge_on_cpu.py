"""NVIDIA's Megatron-Bridge on a CPU, where Transformer Engine cannot be installed.

Megatron-Bridge 0.6 imports Transformer Engine unconditionally, but only its LoRA layers use it, to
recognise Transformer Engine's linear layers. `enable()` registers a package of that name in which
every class is empty: nothing is an instance of them. It is registered after Megatron-Core was imported,
which therefore finds that Transformer Engine is missing, and builds its own layers.
"""

import functools
import importlib.machinery
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from mor_megatron.platform import cpu


def enable() -> None:
    """Make Megatron-Bridge run on the CPU in this process. Calling it again has no effect.

    Call it before `megatron.bridge` is imported. `torch.distributed` must use the gloo backend.

    Raises:
        RuntimeError: CUDA is available, or megatron-core has another version.
    """
    cpu.enable()
    _enable_once()


@functools.cache
def _enable_once() -> None:
    # These look for Transformer Engine themselves, and have to find that it is missing.
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.hybrid.hybrid_layer_specs  # noqa: F401

    if find_spec("transformer_engine") is None:
        for name in ("transformer_engine", "transformer_engine.pytorch"):
            sys.modules[name] = _Empty(name)
            sys.modules[name].__version__ = "0"  # older than any that is asked for
    # model_provider.py:251, :321: ranks are assigned to devices before groups exist.
    torch.cuda.set_device = lambda device: None


class _Empty(ModuleType):
    """A module that has every class and submodule it is asked for, all of them empty."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full_name = f"{self.__name__}.{name}"
        made = _Empty(full_name) if name.islower() else type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made
