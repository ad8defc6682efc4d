"""Small Megatron models whose weights, losses and gradients can be compared between layouts.

Every function runs on a rank (inside `pool.run`). `chunks` is a rank's list of model chunks: one,
or `vpp` of them. Parameters are named and cut by Megatron's own `sharded_state_dict`, so a
comparison also checks that it is right.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor, nn
from torch.nn import functional as F

from mor_megatron import Norm, mtp_block_spec
from mor_megatron.platform import cpu

VOCAB_SIZE = 64
MAX_SEQUENCE_LENGTH = 64
ForwardStep = Callable[[Iterator[Tensor], nn.Module], Any]
BlockBuilder = Callable[[TransformerConfig, int | None], TransformerBlockSubmodules]


def initialize(
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    ep: int = 1,
    etp: int | None = None,
    cp: int = 1,
    seed: int = 123,
) -> None:
    """Lays the world out (the rest is data parallel) and seeds it; on the CPU platform without GPUs."""
    if not torch.cuda.is_available():
        cpu.enable()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    model_parallel_cuda_manual_seed(seed)


def device() -> torch.device:
    """Where this rank computes."""
    is_gpu = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")


LLAMA_LIKE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 64,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "pipeline_dtype": torch.float32,
    # Batched sends cross at PP=2 with virtual stages, where the previous rank is also the next.
    "batch_p2p_comm": False,
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
}
"""Fields of a configuration of two layers, whatever the layout."""


def tiny_config(**overrides: Any) -> TransformerConfig:
    """A Llama-like configuration of two layers in the current layout, with `overrides`."""
    virtual_stages = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    layout: dict[str, Any] = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": virtual_stages,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        "overlap_p2p_comm": virtual_stages is not None,
    }
    return make_config(**(LLAMA_LIKE | layout | overrides))


def make_config(**fields: Any) -> TransformerConfig:
    """Megatron's configuration of these fields, with latent attention where they ask for it."""
    kind = MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig
    return kind(**fields)


def local_layer(config: TransformerConfig) -> ModuleSpec:
    """Megatron's own layer without Transformer Engine, dense or MoE as configured, and our norm."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization=config.normalization
    )
    return replace(
        spec, submodules=replace(spec.submodules, input_layernorm=Norm, pre_mlp_layernorm=Norm)
    )


def local_block(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The plain stack: as many `local_layer`s as this stage holds."""
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[local_layer(config)] * num_layers, layer_norm=Norm
    )


def tiny_gpt(
    config: TransformerConfig, block: BlockBuilder = local_block, tied: bool = False
) -> list[GPTModel]:
    """This rank's chunks of an unmodified `GPTModel` with RoPE, set by `fill_parameters`.

    Args:
        config: from `tiny_config`.
        block: gives the block of a stage, from the config and the index of its virtual stage.
        tied: whether the output layer uses the embedding's weights.
    """
    virtual_stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in [None] if virtual_stages is None else range(virtual_stages):
        chunk = GPTModel(
            config,
            block(config, vp_stage),
            vocab_size=VOCAB_SIZE,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope",
            mtp_block_spec=mtp_block_spec(config, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        chunks.append(chunk.to(device()))
    fill_parameters(chunks)
    return chunks


def data_parallel(chunks: list[GPTModel], **options: Any) -> list[DistributedDataParallel]:
    """Wraps the chunks in Megatron's DDP and connects it to the schedules.

    `options` are fields of `DistributedDataParallelConfig`. A bf16 model gets a `Float16Module`.
    """
    config, ddp_config = chunks[0].config, DistributedDataParallelConfig(**options)
    wrapped = []
    for index, chunk in enumerate(chunks):
        module = Float16Module(config, chunk) if config.bf16 else chunk
        wrapped.append(
            DistributedDataParallel(config, ddp_config, module, disable_bucketing=index > 0)
        )
    if config.finalize_model_grads_func is None:  # as Megatron's training loop
        config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


def build_optimizer(chunks: list[DistributedDataParallel], **options: Any) -> MegatronOptimizer:
    """Megatron's optimizer over the chunks, Adam at a learning rate of 0.01 unless told otherwise.

    It is distributed when the chunks' DDP is. `options` are fields of `OptimizerConfig`.
    """
    ddp_config, config = chunks[0].ddp_config, chunks[0].config
    fields: dict[str, Any] = {
        "optimizer": "adam",
        "lr": 0.01,
        "bf16": config.bf16,
        "params_dtype": config.params_dtype,
        "use_distributed_optimizer": ddp_config.use_distributed_optimizer,
        "overlap_param_gather": ddp_config.overlap_param_gather,
    }
    return get_megatron_optimizer(OptimizerConfig(**(fields | options)), chunks)


def random_tokens(num_sequences: int, length: int, seed: int = 0) -> Tensor:
    """Token ids, [num_sequences, length + 1]: `length` inputs and their labels.

    Neighbours differ. A document that began with one token twice would have two states that are
    equal but for rounding, between which expert-choice may choose differently in each layout.
    """
    generator = torch.Generator().manual_seed(seed)
    strides = torch.randint(1, VOCAB_SIZE, (num_sequences, length + 1), generator=generator)
    return strides.cumsum(-1) % VOCAB_SIZE


def forward_backward(
    chunks: list[DistributedDataParallel],
    tokens: Tensor,
    micro_batch_size: int = 1,
    forward_only: bool = False,
    step: ForwardStep | None = None,
) -> float:
    """One pass of the layout's own schedule over a batch. It leaves finalized gradients behind.

    Args:
        chunks: from `data_parallel`.
        tokens: the *global* batch, [num_sequences, s + 1], the same on every rank. It is cut over
            the data-parallel ranks and then into microbatches.
        micro_batch_size: sequences per microbatch.
        forward_only: no gradients.
        step: computes the loss of a microbatch of rows; default: `forward_step`.

    Returns:
        The loss per token of the global batch, on every rank.
    """
    world = parallel_state.get_data_parallel_world_size()
    share = tokens.chunk(world)[parallel_state.get_data_parallel_rank()]
    microbatches = share.split(micro_batch_size)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=step or forward_step,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=chunks,
        num_microbatches=len(microbatches),
        seq_length=tokens.size(1) - 1,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    # Only last stages report; the others add nothing to either sum.
    total = torch.tensor([sum(reports), len(reports)], dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return (total[0] / total[1]).item()


def train_step(
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    tokens: Tensor,
    micro_batch_size: int = 1,
    step: ForwardStep | None = None,
) -> float:
    """`forward_backward`, then a step of the optimizer. Returns the loss before the step."""
    optimizer.zero_grad()
    loss = forward_backward(chunks, tokens, micro_batch_size, step=step)
    succeeded, _, _ = optimizer.step()
    assert succeeded, "the optimizer skipped its step"
    return loss


def fill_parameters(chunks: list[Any]) -> None:
    """Sets every parameter from its global name and each element's global index, and nothing else.

    Call it before an optimizer is built (which may keep a copy).
    """
    with torch.no_grad():
        for chunk in chunks:
            for parameter, entry in _sharded_parameters(chunk):
                for shard in _shards(entry, parameter.data):
                    shard.data.copy_(_reference_values(shard)[shard.global_slice()])


def gather_parameters(chunks: list[Any]) -> dict[str, Tensor]:
    """All parameters by global name, whole, on every rank. Replicas must be bitwise equal."""
    return _gather(chunks, lambda parameter: parameter.detach())


def gather_gradients(chunks: list[Any]) -> dict[str, Tensor]:
    """All gradients by global name, whole, on every rank. Replicas must be bitwise equal.

    With the distributed optimizer a rank's buffer holds the reduced gradient of its own shard only:
    compare the parameters after a step instead.
    """
    return _gather(chunks, lambda parameter: getattr(parameter, "main_grad", parameter.grad))


def forward_step(
    microbatches: Iterator[Tensor], model: nn.Module
) -> tuple[Tensor, Callable[..., Any]]:
    """Of a schedule: the loss of the next microbatch `[b, s + 1]`, of this rank's part of it."""
    tokens = next(microbatches).to(device())  # [b, s + 1]
    positions = torch.arange(tokens.size(1) - 1, device=tokens.device).expand(tokens.size(0), -1)
    batch = {"tokens": tokens[:, :-1], "positions": positions, "labels": tokens[:, 1:]}
    if parallel_state.get_context_parallel_world_size() > 1:
        group = parallel_state.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    output = model(batch["tokens"], batch["positions"], None, labels=batch["labels"])
    return output, lambda losses: (losses.mean(), losses.detach().mean())


def _sharded_parameters(
    chunk: Any,
) -> Iterator[tuple[nn.Parameter, ShardedTensor | ShardedTensorFactory]]:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    entries = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    for name, parameter in chunk.named_parameters():
        assert name in entries, f"{name} is missing from sharded_state_dict()"
        yield parameter, entries[name]


def _shards(entry: ShardedTensor | ShardedTensorFactory, data: Tensor) -> list[ShardedTensor]:
    """Where `data`, laid out like a parameter, lies in the global tensor, as views of `data`."""
    if isinstance(entry, ShardedTensorFactory):
        # A gated linear_fc1: the rank's two halves lie apart in the global tensor.
        return cast(list[ShardedTensor], replace(entry, data=data).build())
    return [replace(entry, data=data, dtype=data.dtype)]


def _reference_values(shard: ShardedTensor) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(shard.key.encode()))
    values = 0.1 * torch.randn(shard.global_shape, generator=generator)
    return values + 1 if shard.key.endswith(("norm.weight", "norm_weight")) else values


def _gather(chunks: list[Any], read: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    pieces = []
    for chunk in chunks:
        for parameter, entry in _sharded_parameters(chunk):
            value = read(parameter)
            assert value is not None, f"{entry.key} has no gradient"
            for shard in _shards(entry, value):
                pieces.append(
                    (shard.key, shard.global_shape, shard.global_slice(), shard.data.cpu().clone())
                )
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, pieces)
    whole: dict[str, Tensor] = {}
    for rank, rank_pieces in enumerate(gathered):
        for key, shape, where, data in rank_pieces:
            full = whole.setdefault(key, torch.full(shape, torch.nan, dtype=data.dtype))
            known = ~full[where].isnan()
            assert torch.equal(full[where][known], data[known]), (
                f"{key}: the replica on rank {rank} differs"
            )
            full[where] = data
    return whole
