"""FSDP2 and tensor parallelism for a MoRModel, and what its routers need of the optimizer."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division

from mor_huggingface.training import Counts
from mor_layers import MoRTransformer
from mor_layers.models import DecoderStack
from mor_titan.model import MoRModel
from mor_titan.tensor_parallel import divide


def parallelize(
    model: MoRModel,
    *,
    parallel_dims: Any,
    training: Any,
    parallelism: Any,
    compile_config: Any,
    ac_config: Any,
    dump_folder: str,
) -> MoRModel:
    """Divide the model over the tensor-parallel ranks, and shard it over the data-parallel ones.

    A recursion is one unit: its weights are gathered once for all steps. Activation checkpointing, if
    it is on, recomputes recursions step by step.
    """
    inner = model.model
    if parallel_dims.tp_enabled:
        divide(inner, parallel_dims.get_mesh("tp"))
    for recursion in inner.recursions:
        recursion.recompute = ac_config is not None
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    options = {
        "mesh": parallel_dims.get_mesh(names),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        ),
        "reshard_after_forward": parallelism.fsdp_reshard_after_forward != "never",
    }
    units = [*inner.recursions, *inner.prelude.layers]
    for stack in (*inner.between, inner.coda):
        units += cast(DecoderStack, stack).layers
    for unit in units:
        fully_shard(unit, **options)
    fully_shard(model, **options)
    disable_fsdp_gradient_division(model)  # the loss is divided by the tokens of all ranks
    for module in (model, *units):
        # Otherwise gradients are multiplied by 1 as they are summed, which only NCCL can do.
        cast(FSDPModule, module).set_force_sum_reduction_for_comms(True)
    return model


def update_routers_after_steps(
    optimizers: Any, model_parts: Sequence[nn.Module], parallel_dims: Any
) -> None:
    """Let each optimizer step update the routers from the tokens of all micro-batches and ranks.

    Tensor-parallel ranks see the same tokens, which count once.
    """
    (part,) = model_parts
    model = cast(MoRTransformer, cast(MoRModel, part).model)
    # Where data is not parallel, there is no mesh of batches, and that of FSDP2 has one rank.
    name = "batch" if parallel_dims.dp_enabled else "fsdp"
    counts = Counts(model, parallel_dims.get_mesh(name).get_group())
    model.register_forward_hook(counts.add)
    optimizers.register_step_post_hook(lambda *arguments, **named: counts.advance())
