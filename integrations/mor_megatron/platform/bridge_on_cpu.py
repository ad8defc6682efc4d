"""NVIDIA's Megatron-Bridge on a CPU, for development and tests.

Megatron-Bridge 0.6 imports several packages for GPUs and for data in the cloud, whether a model needs
them or not. `enable()` registers a stand-in for each that is missing, in which every class is empty:
nothing is an instance of it, and none is used. Where Megatron-Core asks for one of these packages
itself, it is imported first, so that it finds that the package is missing and builds its own layers.

Line numbers refer to megatron-bridge 0.6.2.
"""

import functools
import importlib.machinery
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from mor_megatron.platform import cpu, training_on_cpu

_MISSING = (
    # peft/lora_layers.py:20, to recognise linear layers that adapters are put on.
    "transformer_engine",
    "transformer_engine.pytorch",
    # training/pretrain.py:18, for restarts within a process.
    "nvidia_resiliency_ext",
    "nvidia_resiliency_ext.inprocess",
    # data/energon/base_energon_datamodule.py:19, for images and sound.
    "megatron.energon",
)


def enable() -> None:
    """Make conversions of Megatron-Bridge run on the CPU in this process.

    Call it before `megatron.bridge` is imported. `torch.distributed` must use the gloo backend. Calling
    it again has no effect.

    Raises:
        RuntimeError: CUDA is available, or megatron-core has another version.
    """
    cpu.enable()
    _enable_once()


@functools.cache
def _enable_once() -> None:
    # They look for Transformer Engine themselves.
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.hybrid.hybrid_layer_specs  # noqa: F401

    for name in _MISSING:
        if name not in sys.modules and find_spec(name) is None:
            sys.modules[name] = _StandIn(name)
    # model_provider.py:251, :321.
    torch.cuda.set_device = lambda device: None


def enable_training() -> None:
    """Make Megatron-Bridge's training loop run on the CPU too, with `dist.distributed_backend="gloo"`.

    Raises:
        RuntimeError: CUDA is available, or megatron-core has another version.
    """
    training_on_cpu.enable()
    enable()
    _enable_training_once()


@functools.cache
def _enable_training_once() -> None:
    from megatron.bridge.data import loaders  # type: ignore[import-not-found]
    from megatron.bridge.training import eval as evaluation  # type: ignore[import-not-found]
    from megatron.bridge.training import initialize, setup, train  # type: ignore[import-not-found]
    from megatron.bridge.training.utils import train_utils  # type: ignore[import-not-found]

    for owner in (
        loaders,  # :406
        setup,  # :281
        train,  # :1030, exit flags
        evaluation,
        train_utils,  # :769, :1210
    ):
        cpu.rewrite_literals(owner)
    # initialize.py:91 asserts that there is a device.
    setup.initialize_megatron = functools.partial(  # type: ignore[attr-defined]
        initialize.initialize_megatron, allow_no_cuda=True
    )
    # initialize.py:311 warms up kernels; the wheel of Megatron-Core contains the compiled helpers.
    initialize._warmup_jit_function = lambda *args, **kwargs: None
    if find_spec("megatron.core.datasets.helpers_cpp") is not None:
        initialize.compile_helpers = lambda: None


class _StandIn(ModuleType):
    """A module that has every class, function and submodule that it is asked for; none does anything."""

    __version__ = "0"  # older than any that is asked for

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _StandIn(f"{self.__name__}.{name}") if name.islower() else type(name, (_Empty,), {})
        setattr(self, name, made)
        return made


class _Empty:
    """A base of classes that are only named."""

    def __class_getitem__(cls, item: Any) -> Any:  # in annotations
        return cls
