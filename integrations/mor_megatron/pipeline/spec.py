"""Layer specs in which each recursion step is a virtual pipeline stage.

The layers of the block are distributed over the pipeline. With `PP` stages and as many virtual stages
as recursions, chunk `v` of a rank runs step `v + 1` on the rank's own `K / PP` layers, and a
microbatch passes through all stages `N_r` times:

    rank 0:  prelude, route, layers | route, layers   | route, layers
    rank 1:  layers, combine        | layers, combine | layers, combine, coda

All chunks of a rank use the same modules, so no weight is stored on two ranks. Later chunks do not
register these modules, so DDP, the optimizer, gradient norms and checkpoints see each weight once.

    chunks = []
    for v in range(config.virtual_pipeline_model_parallel_size):
        block = recursion_pipeline_spec(config, recursion, vp_stage=v)
        chunks.append(GPTModel(config, block, ..., vp_stage=v))
    connect_stages(chunks)
    recursion_forward_backward(model=chunks, ...)  # called like Megatron's own schedule
"""

from collections.abc import Sequence
from typing import Any, cast

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import unwrap_model
from torch import nn

from mor_layers import RecursionConfig
from mor_megatron.layers import RecursionSubmodules, validate
from mor_megatron.models import default_layer_spec, final_norm
from mor_megatron.pipeline.rules import _layout, _stages, validate_pipeline
from mor_megatron.pipeline.stage import RecursionStage, RepeatedStage


def recursion_pipeline_spec(
    config: TransformerConfig,
    recursion: RecursionConfig,
    layer_spec: ModuleSpec | None = None,
    vp_stage: int | None = None,
    dense_layer_spec: ModuleSpec | None = None,
    documents: bool = False,
) -> TransformerBlockSubmodules:
    """The `transformer_layer_spec` of one chunk of this rank, for an unmodified GPTModel.

    This function sets `config.pipeline_model_parallel_layout` such that checkpoint keys are those of
    a model on one stage. Build all chunks from the same `config`.

    Args:
        config: Megatron's configuration. `num_layers` is the unrolled depth.
        recursion: sharing, steps, router, KV policy and norms.
        layer_spec: spec of the shared layers. Default: `default_layer_spec(config)`.
        vp_stage: the chunk, 0 .. N_r - 1, which is the 0-based step that it runs.
        dense_layer_spec: spec of the prelude and coda layers. Default: `layer_spec`.
        documents: whether batches may have several documents in a sequence, or padding. This sends
            more data and makes each stage synchronize with the device when it arrives.

    Raises:
        ValueError: a setting is not supported in this layout. The message says what to use instead.
    """
    schedule = recursion.schedule(config.num_layers)
    validate(config, recursion)
    validate_pipeline(config, recursion, schedule)
    if vp_stage is None or not 0 <= vp_stage < recursion.num_recursions:
        raise ValueError(
            f"vp_stage={vp_stage} must be in 0..{recursion.num_recursions - 1}, the steps."
        )
    rank, stages = parallel_state.get_pipeline_model_parallel_rank(), _stages(config)
    config.pipeline_model_parallel_layout = _layout(config, schedule)
    layer_spec = layer_spec or default_layer_spec(config)
    dense = dense_layer_spec or layer_spec
    own = schedule.block_size // stages
    if vp_stage:
        stage = ModuleSpec(module=RepeatedStage, params={"step": vp_stage})
    else:
        stage = ModuleSpec(
            module=RecursionStage,
            submodules=cast(Any, RecursionSubmodules([layer_spec] * own)),
            params={
                "recursion": recursion,
                "block_size": schedule.block_size,
                "first_in_block": rank * own,
                "documents": documents,
            },
        )
    is_first = rank == 0 and vp_stage == 0
    is_last = rank == stages - 1 and vp_stage == recursion.num_recursions - 1
    prelude, coda = schedule.prelude * is_first, schedule.coda * is_last
    return TransformerBlockSubmodules(
        layer_specs=[dense] * prelude + [stage] + [dense] * coda,
        layer_norm=final_norm(layer_spec),
    )


def connect_stages(chunks: Sequence[nn.Module]) -> None:
    """Let the later chunks of this rank use the layers of the first one.

    Call this after building all chunks and before wrapping or running them.

    Raises:
        ValueError: `chunks` are not all chunks of one rank in order.
    """
    stages = [
        [m for m in chunk.modules() if isinstance(m, RecursionStage | RepeatedStage)]
        for chunk in chunks
    ]
    names = [[type(stage).__name__ for stage in chunk] for chunk in stages]
    expected = [["RecursionStage"]] + [["RepeatedStage"]] * (len(chunks) - 1)
    if names != expected:
        raise ValueError(
            f"the chunks hold {names}, but {expected} was expected. Pass all chunks of this rank in "
            "order, each built from recursion_pipeline_spec."
        )
    first = cast(RecursionStage, stages[0][0])
    for (stage,) in cast(list[list[RepeatedStage]], stages[1:]):
        stage.use(first)
    if not first.is_exit:
        return

    decoder = cast(nn.Module, chunks[-1].decoder)

    def shorten(block: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        # Megatron makes the rotary table as long as the received tensor, which is longer than the
        # sequence. The coda and the heads of multi-token prediction need one of the sequence's length.
        if named.get("rotary_pos_emb") is not None:
            length = first.layout.sequence_length(len(cast(Any, decoder).input_tensor))
            is_packed = named.get("packed_seq_params") is not None
            table = first.cut_table(named["rotary_pos_emb"], length, is_packed)
            named["rotary_pos_emb"] = table
        return inputs, named

    heads = getattr(chunks[-1], "mtp", None)
    for block in (decoder, heads):
        if block is not None:
            block.register_forward_pre_hook(shorten, with_kwargs=True)


def carried_length(chunks: Sequence[nn.Module], seq_length: int) -> int:
    """The `seq_length` to pass to a schedule, so that its tensors have room for all data to send.

    Args:
        chunks: the chunks of this rank, wrapped or not.
        seq_length: length of the sequences.
    """
    layer: Any = unwrap_model(chunks[0])
    (stage,) = (m for m in layer.modules() if isinstance(m, RecursionStage))
    stage.announced_lengths.add(seq_length)
    return stage.layout.carried_length(seq_length)


def recursion_forward_backward(
    *, model: Sequence[nn.Module], seq_length: int, **arguments: Any
) -> Any:
    """Run Megatron's `get_forward_backward_func()` on this model, with the same arguments."""
    length = carried_length(model, seq_length)
    return get_forward_backward_func()(model=model, seq_length=length, **arguments)
