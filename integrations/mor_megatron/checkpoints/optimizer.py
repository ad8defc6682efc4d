"""The state of Megatron's optimizers in a checkpoint: tensors by parameter name, and a step count.

This state does not depend on the parallel layout. The parameter groups of a rank and the number of
chained optimizers (one more with expert parallelism, and one more for Muon's matrices) follow from the
run and are not saved.

The distributed optimizer needs corrections to load what it saved. They are only active inside
`sharded_state` and `load_state`. Line numbers refer to megatron-core 0.19.2.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedStateDict,
)
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_state(
    optimizer: MegatronOptimizer, model_state: ShardedStateDict, is_loading: bool
) -> list[ShardedStateDict]:
    """The optimizer's tensors, sharded like their parameters.

    Args:
        optimizer: an optimizer from `get_megatron_optimizer` that uses Adam, or Muon beside it.
        model_state: sharded state of all chunks that it optimizes.
        is_loading: True if the result will be loaded into and passed to `load_state`, False if it
            will be saved.

    Returns:
        One dict per optimizer that Megatron chained. Only its sharded tensors are part of the
        checkpoint.

    Raises:
        ValueError: it is another optimizer.
    """
    states = []
    for part in _parts(optimizer):
        _allocate_state(part)
        with _corrected(part):
            state = part.sharded_state_dict(model_state, is_loading, metadata=dict(_METADATA))
        states.append(dict_list_map_outplace(_keep_out_of_checkpoint, state))
    return states


def load_state(
    optimizer: MegatronOptimizer, states: list[dict[str, Any]], shared: dict[str, Any]
) -> None:
    """Load the state of an optimizer.

    Args:
        states: the result of `sharded_state`, filled from a checkpoint.
        shared: the saved result of `shared_state`.
    """
    for part, state in zip(_parts(optimizer), states, strict=True):
        is_plain = not HAVE_APEX_OR_TE and not isinstance(part, DistributedOptimizer)
        if is_plain and not _is_muon(part):
            # optimizer.py:1187 and :1376 omit a step of zero, but torch's Adam requires a step.
            inner = state.get("optimizer", state)
            inner["state"]["common_step"] = torch.tensor(float(shared["step"]))
        with _corrected(part):
            part.load_state_dict(state)
        if not _is_muon(part):
            _set_step(part, shared["step"])
        scaler = _grad_scaler(part)
        if scaler is not None and shared["grad_scaler"] is not None:
            scaler.load_state_dict(shared["grad_scaler"])


def shared_state(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """The state that all parameters and ranks share: the number of steps, and the loss scale."""
    parts = _parts(optimizer)
    for part in parts:
        _allocate_state(part)
    steps = {_get_step(part) for part in parts if not _is_muon(part)}
    assert len(steps) == 1, f"parameters have taken different numbers of steps: {sorted(steps)}"
    scaler = _grad_scaler(parts[0])
    return {"step": steps.pop(), "grad_scaler": None if scaler is None else scaler.state_dict()}


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    chained = isinstance(optimizer, ChainedOptimizer)
    parts: list[Any] = optimizer.chained_optimizers if chained else [optimizer]
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def _is_muon(part: Any) -> bool:
    """Whether a part updates matrices by Muon, which counts no steps."""
    return isinstance(part.optimizer, TensorParallelMuon)


def _grad_scaler(part: Any) -> Any:
    return getattr(part, "grad_scaler", None)  # an FP32Optimizer does not have the attribute


def _keep_out_of_checkpoint(leaf: Any) -> Any:
    if isinstance(leaf, (ShardedBase, LocalNonpersistentObject)):
        return leaf
    return LocalNonpersistentObject(leaf)


def _allocate_state(part: Any) -> None:
    """Create the state that torch's Adam otherwise creates at its first step.

    Megatron asserts that the state exists (distrib_optimizer.py:839). Its own way to create it is a
    step with zero gradients (:1422), which would decay the weights.
    """
    if HAVE_APEX_OR_TE or _is_muon(part):
        if part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)
        return
    adam = part.optimizer
    if not isinstance(adam, torch.optim.Adam):
        raise ValueError(
            f"cannot save or load the state of {type(adam).__name__}. Use torch.optim.Adam, or Muon."
        )
    for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
        if not adam.state[parameter]:
            adam.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _get_step(part: Any) -> int:
    if HAVE_APEX_OR_TE:
        return max(int(group.get("step", 0)) for group in part.optimizer.param_groups)
    steps = {int(state["step"]) for state in part.optimizer.state.values()}
    assert len(steps) == 1, f"parameters have taken different numbers of steps: {sorted(steps)}"
    return steps.pop()


def _set_step(part: Any, step: int) -> None:
    if HAVE_APEX_OR_TE:
        for group in part.optimizer.param_groups:
            group["step"] = step
        return
    # Each parameter needs a tensor of its own. distrib_optimizer.py:1032 lets all of them share one,
    # which Adam would then advance once per parameter.
    for state in part.optimizer.state.values():
        state["step"] = torch.tensor(float(step))


@contextmanager
def _corrected(part: Any) -> Iterator[None]:
    """A context in which the methods of a `DistributedOptimizer` are corrected."""
    if not isinstance(part, DistributedOptimizer):
        yield
        return
    set_states, shard = (
        part._set_main_param_and_optimizer_states,
        part.sharded_param_state_fully_reshardable,
    )

    def set_states_but_step(parameter: Any, tensors: dict[str, Any]) -> None:
        # :1223 reads the "step" of torch's Adam for each parameter, but the checkpoint has only one.
        set_states(parameter, {"step": None, **tensors})

    def shard_by_unpadded_offsets(*args: Any, **kwargs: Any) -> ShardedStateDict | None:
        # :1790 slices tensors that have no padding between buckets (:1399) by offsets that include
        # the padding, so everything after the first bucket would be shifted.
        with ExitStack() as stack:
            for buffer in part.buffers:
                stack.enter_context(_replaced(buffer, "param_index_map", _unpadded_map(buffer)))
            return shard(*args, **kwargs)

    with ExitStack() as stack:
        if not HAVE_APEX_OR_TE:
            name = "_set_main_param_and_optimizer_states"
            stack.enter_context(_replaced(part, name, set_states_but_step))
        name = "sharded_param_state_fully_reshardable"
        stack.enter_context(_replaced(part, name, shard_by_unpadded_offsets))
        yield


def _unpadded_map(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """The `param_index_map` that a buffer would have without padding between its buckets."""
    padding, shifts = 0, []  # padding before each bucket
    for (start, end), bucket in zip(buffer.bucket_indices, buffer.buckets, strict=True):
        shifts.append(padding)
        padding += end - start - bucket.numel_unpadded
    return {
        parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    was_own, previous = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, previous)
        else:
            delattr(owner, name)
