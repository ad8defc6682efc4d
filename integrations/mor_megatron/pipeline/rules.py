"""Requirements of recursion steps as virtual pipeline stages, checked before building a model."""

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from mor_layers import RecursionConfig
from mor_layers.recursion import SharingSchedule
from mor_megatron.parallel import (
    STEPS_AS_STAGES_RULES,
    TAUGHT_EXITS_RULES,
    Arrangement,
    Names,
    require_rules,
)


def validate_pipeline(
    config: TransformerConfig, recursion: RecursionConfig, schedule: SharingSchedule
) -> None:
    """Check that all settings support recursion steps as virtual stages.

    Raises:
        ValueError: a setting does not. The message says why, and what to use instead.
    """
    arrangement = Arrangement(
        config.num_layers,
        recursion,
        pipeline=_stages(config),
        pipeline_layout="steps_as_stages",
        context=config.context_parallel_size,
    )
    require_rules(arrangement, (*TAUGHT_EXITS_RULES, *STEPS_AS_STAGES_RULES), Names())
    for is_wrong, given, reason in _rules(config, recursion, schedule):
        if is_wrong:
            raise ValueError(f"{given} cannot run with recursion steps as virtual stages: {reason}")


def _rules(
    config: TransformerConfig, recursion: RecursionConfig, schedule: SharingSchedule
) -> list[tuple[bool, str, str]]:
    stages, chunks = _stages(config), config.virtual_pipeline_model_parallel_size
    steps, size = recursion.num_recursions, schedule.block_size
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
            chunks != steps,
            f"virtual_pipeline_model_parallel_size={chunks}",
            f"each chunk runs one of the {steps} steps. Use "
            f"virtual_pipeline_model_parallel_size={steps}.",
        ),
        (
            any(getattr(config, name) for name in uneven),
            "an uneven split of the pipeline",
            f"every stage holds {size} / {stages} layers of the block. Leave out "
            f"{', '.join(uneven)}.",
        ),
        (
            layout is not None and repr(layout) != repr(_layout(config, schedule)),
            f"pipeline_model_parallel_layout={layout!r}",
            "the layout follows from the recursion. Leave it out.",
        ),
        (
            config.pipeline_dtype is not dtype,
            f"pipeline_dtype={config.pipeline_dtype}",
            f"hidden states are sent in their own dtype. Use pipeline_dtype={dtype}.",
        ),
        (
            config.variable_seq_lengths,
            "variable_seq_lengths=True",
            "all tensors that are sent have one shape. Use variable_seq_lengths=False.",
        ),
        (
            config.overlap_moe_expert_parallel_comm,
            "overlap_moe_expert_parallel_comm=True",
            "it splits layers into parts, but a step runs each layer as a whole. Leave it out.",
        ),
        (
            config.recompute_granularity == "full" and config.recompute_method == "block",
            "recompute_method='block'",
            "later steps need to know whether step 1 is recomputed. Use 'uniform'.",
        ),
        (
            bool(config.distribute_saved_activations),
            "distribute_saved_activations=True",
            "the tensors that are sent cannot be split over the ranks. Use sequence_parallel=True.",
        ),
    ]


def _stages(config: TransformerConfig) -> int:
    return config.pipeline_model_parallel_size


def _dtype(config: TransformerConfig) -> torch.dtype:
    return torch.float32 if config.fp32_residual_connection else config.params_dtype


def _layout(config: TransformerConfig, schedule: SharingSchedule) -> PipelineParallelLayerLayout:
    """A layout that gives layers the same numbers, and so the same checkpoint keys, as on one stage.

    Megatron numbers the layers of a chunk after those of all earlier chunks. The recursion must have
    the same number on all ranks, and the coda must have the number that it has in a model on one
    stage. Therefore all layers of the block except one are declared as layers of the first rank's
    second chunk.
    """
    stages, heads = _stages(config), config.mtp_num_layers or 0
    rows: list[list[str]] = [[] for _ in range(stages * schedule.num_recursions)]
    ends = schedule.prelude + schedule.coda
    rows[0] = ["embedding"] + ["decoder"] * schedule.prelude
    rows[stages] = ["decoder"] * (schedule.num_unrolled_layers - ends - 1)
    rows[-1] = ["decoder"] * (1 + schedule.coda) + ["mtp"] * heads + ["loss"]
    return PipelineParallelLayerLayout(rows, stages)
