"""A recursion step is a virtual pipeline stage: the block's layers spread over the pipeline.

With `PP` stages and as many virtual stages as recursions, chunk `v` of a rank runs step `v + 1`
over the rank's own `K / PP` layers, and a microbatch goes round `N_r` times:

    rank 0:  prelude, route, layers | route, layers   | route, layers
    rank 1:  layers, combine        | layers, combine | layers, combine, coda

All chunks of a rank use the same modules, so no weight lives on two ranks. Later chunks do not
register them: DDP, the optimizer, gradient norms and checkpoints see each weight once.

    chunks = []
    for v in range(config.virtual_pipeline_model_parallel_size):
        block = recursion_pipeline_spec(config, recursion, vp_stage=v)
        chunks.append(GPTModel(config, block, ..., vp_stage=v))
    connect_stages(chunks)
    recursion_forward_backward(model=chunks, ...)  # called as Megatron's own schedule
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import unwrap_model
from torch import nn

from mor_layers import RecursionConfig, SharingSchedule
from mor_megatron.layer import RecursionSubmodules
from mor_megatron.pipeline_stage import RecursionStage, RepeatedStage
from mor_megatron.specs import default_layer_spec, final_norm
from mor_megatron.validation import validate


def recursion_pipeline_spec(
    config: TransformerConfig,
    recursion: RecursionConfig,
    layer_spec: ModuleSpec | None = None,
    vp_stage: int | None = None,
    dense_layer_spec: ModuleSpec | None = None,
    documents: bool = False,
) -> TransformerBlockSubmodules:
    """The layers of one chunk of this rank: `transformer_layer_spec` of an unmodified GPTModel.

    `config.pipeline_model_parallel_layout` is set so that checkpoint keys are those of a model on
    one stage. Build every chunk from the same `config`.

    Args:
        config: `num_layers` counts the unrolled depth.
        recursion: sharing, steps, router, KV policy, norms.
        layer_spec: the shared layers; default `default_layer_spec(config)`.
        vp_stage: the chunk, 0 .. N_r - 1: the 0-based step it runs.
        dense_layer_spec: prelude and coda layers; default `layer_spec`.
        documents: whether batches may have several documents in a sequence, or padding; more then
            travels, and stages wait for its arrival.

    Raises:
        ValueError: settings that cannot run in this layout, with the way out.
    """
    schedule = recursion.schedule(config.num_layers)
    validate(config, recursion)
    validate_pipeline(config, recursion, schedule)
    if vp_stage is None or not 0 <= vp_stage < recursion.num_recursions:
        raise ValueError(
            f"vp_stage={vp_stage} must lie in 0..{recursion.num_recursions - 1}, one chunk a step."
        )
    rank, stages = parallel_state.get_pipeline_model_parallel_rank(), _stages(config)
    config.pipeline_model_parallel_layout = _layout(schedule, stages)
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
    """Let the later chunks of this rank use the first one's layers.

    Call it when all of them are built, before they are wrapped or run.

    Raises:
        ValueError: these are not the chunks of one rank, in order.
    """
    stages = [
        [m for m in chunk.modules() if isinstance(m, RecursionStage | RepeatedStage)]
        for chunk in chunks
    ]
    names = [[type(stage).__name__ for stage in chunk] for chunk in stages]
    expected = [["RecursionStage"]] + [["RepeatedStage"]] * (len(chunks) - 1)
    if names != expected:
        raise ValueError(
            f"the chunks hold {names}; expected {expected}. Pass all chunks of this rank in order, "
            "each built from recursion_pipeline_spec."
        )
    first = cast(RecursionStage, stages[0][0])
    for (stage,) in cast(list[list[RepeatedStage]], stages[1:]):
        stage.use(first)
    if not first.is_exit:
        return

    def shorten(block: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        # Megatron makes the rotary table as long as what arrives; the coda needs the sequence's.
        if named.get("rotary_pos_emb") is not None:
            length = first.layout.sequence_length(len(block.input_tensor))
            named["rotary_pos_emb"] = named["rotary_pos_emb"][:length]
        return inputs, named

    decoder = cast(nn.Module, chunks[-1].decoder)
    decoder.register_forward_pre_hook(shorten, with_kwargs=True)


def carried_length(chunks: Sequence[nn.Module], seq_length: int) -> int:
    """What a schedule must be given as `seq_length`, so that what travels has room.

    Args:
        chunks: this rank's chunks, bare or wrapped.
        seq_length: length of the sequences.
    """
    layer: Any = unwrap_model(chunks[0])
    (stage,) = (m for m in layer.modules() if isinstance(m, RecursionStage))
    stage.announced_lengths.add(seq_length)
    return stage.layout.carried_length(seq_length)


def recursion_forward_backward(
    *, model: Sequence[nn.Module], seq_length: int, **arguments: Any
) -> Any:
    """Megatron's `get_forward_backward_func()` on this model: same arguments, same results."""
    length = carried_length(model, seq_length)
    return get_forward_backward_func()(model=model, seq_length=length, **arguments)


def validate_pipeline(
    config: TransformerConfig, recursion: RecursionConfig, schedule: SharingSchedule
) -> None:
    """Refuse what cannot run with steps as virtual stages.

    Raises:
        ValueError: for the first such setting: what it is, why not, and what to use.
    """
    for is_wrong, given, reason in _rules(config, recursion, schedule):
        if is_wrong:
            raise ValueError(f"{given} cannot run with recursion steps as virtual stages: {reason}")


def _rules(
    config: TransformerConfig, recursion: RecursionConfig, schedule: SharingSchedule
) -> list[tuple[bool, str, str]]:
    stages, chunks = _stages(config), config.virtual_pipeline_model_parallel_size
    steps, size = recursion.num_recursions, schedule.block_size
    below = size - size % stages
    fitting = " or ".join(
        str(n * steps + schedule.prelude + schedule.coda) for n in (below, below + stages) if n
    )
    dtype = _dtype(config)
    layout = config.pipeline_model_parallel_layout
    uneven = (
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
    )
    return [
        (
            config.context_parallel_size > 1,
            f"context_parallel_size={config.context_parallel_size}",
            "what travels between stages is laid out for whole sequences. Use "
            "recursion_block_spec, which keeps the recursion in one stage, or tensor parallelism "
            "with sequence_parallel=True.",
        ),
        (
            not schedule.is_cyclic,
            f"sharing={recursion.sharing!r}",
            "its layers repeat one by one, so no step goes round. Use 'cycle' or 'middle_cycle', "
            "or recursion_block_spec.",
        ),
        (
            stages == 1 or steps == 1,
            f"pipeline_model_parallel_size={stages} with num_recursions={steps}",
            "nothing goes round. Use at least 2 of both, or recursion_block_spec.",
        ),
        (
            chunks != steps,
            f"virtual_pipeline_model_parallel_size={chunks}",
            f"each chunk runs one of the {steps} steps. Use "
            f"virtual_pipeline_model_parallel_size={steps}.",
        ),
        (
            size % stages > 0,
            f"num_layers={config.num_layers}",
            f"a block of {size} layers does not spread evenly over {stages} stages. "
            f"Use num_layers={fitting}.",
        ),
        (
            any(getattr(config, name) for name in uneven),
            "an uneven split of the pipeline",
            f"every stage holds {size} / {stages} layers of the block. Leave out "
            f"{', '.join(uneven)}.",
        ),
        (
            layout is not None and repr(layout) != repr(_layout(schedule, stages)),
            f"pipeline_model_parallel_layout={layout!r}",
            "the layout follows from the recursion. Leave it out.",
        ),
        (
            recursion.kv_policy
            not in ("recursion_wise", "recursive_sharing", "sharing_with_update"),
            f"kv_policy={recursion.kv_policy!r}",
            "only what step 1 makes is kept for later steps. Use 'recursion_wise', "
            "'recursive_sharing' or 'sharing_with_update', or recursion_block_spec.",
        ),
        (
            config.pipeline_dtype is not dtype,
            f"pipeline_dtype={config.pipeline_dtype}",
            f"hidden states travel as they are. Use pipeline_dtype={dtype}.",
        ),
        (
            config.variable_seq_lengths,
            "variable_seq_lengths=True",
            "what travels has one shape. Use variable_seq_lengths=False.",
        ),
        (
            config.overlap_moe_expert_parallel_comm,
            "overlap_moe_expert_parallel_comm=True",
            "it takes layers apart that a step runs as one. Leave it out.",
        ),
        (
            config.recompute_granularity == "full" and config.recompute_method == "block",
            "recompute_method='block'",
            "later steps need to know whether step 1 is computed again. Use 'uniform'.",
        ),
        (
            bool(config.distribute_saved_activations),
            "distribute_saved_activations=True",
            "what travels does not divide by the ranks. Use sequence_parallel=True.",
        ),
    ]


def _stages(config: TransformerConfig) -> int:
    return config.pipeline_model_parallel_size


def _dtype(config: TransformerConfig) -> torch.dtype:
    return torch.float32 if config.fp32_residual_connection else config.params_dtype


def _layout(schedule: SharingSchedule, stages: int) -> PipelineParallelLayerLayout:
    """Megatron numbers a chunk's layers after those of earlier chunks, and checkpoint keys by that.

    So that the recursion has the same number on all ranks, and the coda the one it has in a model
    on one stage, all layers of the block but one count as those of the first rank's second chunk.
    """
    rows: list[list[str]] = [[] for _ in range(stages * schedule.num_recursions)]
    ends = schedule.prelude + schedule.coda
    rows[0] = ["embedding"] + ["decoder"] * schedule.prelude
    rows[stages] = ["decoder"] * (schedule.num_unrolled_layers - ends - 1)
    rows[-1] = ["decoder"] * (1 + schedule.coda) + ["loss"]
    return PipelineParallelLayerLayout(rows, stages)
