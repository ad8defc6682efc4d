"""Megatron-Core 0.19 on a CPU with gloo, for development and continuous integration.

Megatron-Core requires one CUDA device per process. `enable()` replaces its uses of that device:

* functions of `torch.cuda` that raise without a driver are replaced for the whole process;
* the string constants of devices and types (`"cuda"`, `"torch.cuda.FloatTensor"`) are rewritten in
  the bytecode of the Megatron functions that contain them, and nowhere else;
* the few functions that require CUDA tensors in other ways are replaced in the modules that use them.

Importing this module has no effect. Line numbers refer to megatron-core 0.19.2.
"""

import contextlib
import functools
import inspect
import logging
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

_LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
_PINNING_FACTORIES = frozenset({"empty", "empty_like", "full", "ones", "tensor", "zeros"})


def enable() -> None:
    """Make megatron-core 0.19 run on the CPU in this process. Calling it again has no effect.

    Call it before building a Megatron model. `torch.distributed` must use the gloo backend.

    Raises:
        RuntimeError: CUDA is available, or megatron-core has another version.
    """
    import megatron.core

    version = megatron.core.__version__
    if torch.cuda.is_available():
        raise RuntimeError(
            "cpu.enable() was called although CUDA is available. It is only for machines without a"
            " GPU. Remove the call, or hide the GPUs by setting CUDA_VISIBLE_DEVICES to nothing."
        )
    if not version.startswith("0.19."):
        raise RuntimeError(
            "cpu.enable() replaces the CUDA calls of megatron-core 0.19.*, but the installed version"
            f" is {version}. Install megatron-core==0.19.2."
        )
    _enable_once()


@functools.cache
def _enable_once() -> None:
    _replace_torch_cuda()
    _replace_random_state()
    _rewrite_literals()
    _replace_device_transfers()
    _replace_uneven_collectives()


class _InOrder:
    """A stand-in for CUDA streams and events. It does nothing, because the CPU is synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def record_event(self, event: Any = None) -> "_InOrder":
        return event or self

    def synchronize(self) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass


def _replace_torch_cuda() -> None:
    device, stream = torch.device("cpu"), _InOrder()
    for name, stand_in in {
        # A device for new tensors: rotary_pos_embedding.py:78, p2p_communication.py:211,
        # mappings.py:95, layers.py:305, router.py:98, param_and_grad_buffer.py:1162.
        "current_device": lambda: device,
        # p2p_communication.py:419, fully_parallel.py:287, filesystem_async.py:248.
        "synchronize": lambda device=None: None,
        # param_and_grad_buffer.py:632, token_dispatcher.py:922, shared_experts.py:226,
        # pipeline_parallel/utils.py:398.
        "current_stream": lambda device=None: stream,
        # token_dispatcher.py:925, param_and_grad_buffer.py:686, shared_experts.py:237.
        "stream": contextlib.nullcontext,
        # token_dispatcher.py:469, shared_experts.py:192, distributed_data_parallel.py:297.
        "Stream": _InOrder,
        # moe_layer.py:434, dynamic_context.py:1301.
        "Event": _InOrder,
        # random.py:303, rerun_state_machine.py:979.
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        # rerun_state_machine.py:992.
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        # random.py:305, :490.
        "manual_seed": torch.default_generator.manual_seed,
    }.items():
        setattr(torch.cuda, name, stand_in)


def _replace_random_state() -> None:
    """Let `CudaRNGStatesTracker` use the CPU generator instead of the CUDA generator."""
    from megatron.core.tensor_parallel import random

    def get_state(
        device: Any = None, clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    # random.py:118 needs a driver, and :174 defers the new state until CUDA is initialized.
    random._get_cuda_rng_state, random._set_cuda_rng_state = get_state, set_state
    # random.py:333 warns if the CPU generator advances within a fork. Here this is intended.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _rewrite_literals() -> None:
    from megatron.core import utils
    from megatron.core.dist_checkpointing import exchange_utils
    from megatron.core.dist_checkpointing.strategies import state_dict_saver
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import data
    from megatron.core.transformer import utils as transformer_utils

    for owner in (
        schedules,  # autocast :504, total_num_tokens :749, :1121, :2292
        optimizer,  # :315, :690-702, :1249; parameter types :1009-1028
        distrib_optimizer,  # parameter types :401-466, :758
        clip_grads,  # :96-112, :180, :231; gradient type :174
        utils.local_multi_tensor_l2_norm,  # :1332
        transformer_utils,  # causal masks :39, :44
        data,  # broadcast_data :37
        exchange_utils,  # :97-109, :329
        state_dict_saver,  # :204
    ):
        rewrite_literals(owner)


def rewrite_literals(owner: Any) -> None:
    """Name the CPU where the functions of a module or class, or one function, name a CUDA device."""
    for function in _functions_of(owner):
        function.__code__ = _without_cuda(function.__code__)


def _functions_of(owner: Any) -> Iterator[FunctionType]:
    """The functions that a module or class defines, or the function itself, without decorators."""
    if isinstance(owner, (ModuleType, type)):
        module = getattr(owner, "__module__", owner.__name__)
        for member in vars(owner).values():
            if getattr(member, "__module__", None) == module:
                yield from _functions_of(member)
    elif isinstance(function := inspect.unwrap(owner), FunctionType):
        yield function


def _without_cuda(constant: Any) -> Any:
    """A constant of compiled code with the CUDA literals replaced, also in nested code and tuples."""
    if isinstance(constant, CodeType):
        return constant.replace(co_consts=tuple(map(_without_cuda, constant.co_consts)))
    if isinstance(constant, tuple):
        return tuple(map(_without_cuda, constant))
    return _LITERALS.get(constant, constant) if isinstance(constant, str) else constant


class _TorchWithoutPinning:
    """Replaces `torch` in a module that allocates pinned memory, which needs a CUDA driver."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in _PINNING_FACTORIES:
            return value
        return lambda *args, pin_memory=False, **kwargs: value(*args, **kwargs)


def _replace_uneven_collectives() -> None:
    """Pad uneven parts, because gloo only supports equal ones and experts get unequal numbers of
    tokens."""
    from megatron.core.tensor_parallel import mappings

    even_gather = mappings._gather_along_first_dim  # mappings.py:118
    even_scatter = mappings._reduce_scatter_along_first_dim  # mappings.py:159

    def filled(part: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])

    def gather(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        sizes = None if output_split_sizes is None else [int(n) for n in output_split_sizes]
        if sizes is None or group.size() == 1 or (len(set(sizes)) == 1 and sizes[0]):
            return even_gather(input_, group, output_split_sizes, *args, **kwargs)
        if not max(sizes):
            return input_
        parts = even_gather(filled(input_, max(sizes)), group).chunk(len(sizes))
        return torch.cat([part[:rows] for part, rows in zip(parts, sizes, strict=True)])

    def reduce_scatter(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        sizes = None if input_split_sizes is None else [int(n) for n in input_split_sizes]
        if sizes is None or group.size() == 1 or (len(set(sizes)) == 1 and sizes[0]):
            return even_scatter(input_, group, input_split_sizes, *args, **kwargs)
        if not max(sizes):
            return input_
        parts = torch.cat([filled(part, max(sizes)) for part in input_.split(sizes)])
        return even_scatter(parts, group)[: sizes[group.rank()]]

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = reduce_scatter


def _replace_device_transfers() -> None:
    from megatron.core.inference.contexts import dynamic_context
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import router, token_dispatcher

    # language_module.py:307, optimizer.py:586, distrib_optimizer.py:1374, exchange_utils.py:339.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    # dynamic_context.py:869-953.
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    # rope_utils.py:63, dynamic_context.py:975-1124.
    rope_utils.torch = dynamic_context.torch = _TorchWithoutPinning()
    # token_dispatcher.py:926-943 converts split sizes to numpy arrays only when it copies them from
    # a device, but the collectives of mappings.py:445 do not accept tensors.
    token_dispatcher.maybe_move_tensor_to_cpu = _split_sizes
    # router.py:727 compiles a counter at its first use, which requires a C++ compiler on a CPU.
    router.TopKRouter._apply_expert_bias = inspect.unwrap(router.TopKRouter._apply_expert_bias)


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
