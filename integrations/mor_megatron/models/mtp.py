"""Multi-token prediction behind a recursion: Megatron's own layers, in every layout.

    block = recursion_block_spec(config, recursion)
    model = GPTModel(config, block, mtp_block_spec=mtp_block_spec(config), ...)

The heads are plain layers, each with weights of its own, and read the states that leave the last layer
of the unrolled model. They are in the last pipeline stage.

Source: DeepSeek-V3 (arXiv 2412.19437, section 2.2), in Megatron's form.
"""

from dataclasses import replace
from typing import Any, cast

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules

from mor_megatron.layers import RecursionLayer, local_norm
from mor_megatron.models.gpt import final_norm, unrolled_layer_specs


def mtp_block_spec(
    config: TransformerConfig, layer_spec: ModuleSpec | None = None, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The `mtp_block_spec` of an unmodified GPTModel, or None on a stage without heads.

    Megatron's own function gives local layers a norm that does not support sequence parallelism. The
    norm here does. With Transformer Engine the two are the same.

    Call this after the function that makes the layers, which divides them into pipeline stages.

    Args:
        config: `mtp_num_layers` is the number of heads; None makes none.
        layer_spec: spec of the layer in each head. Default: that of the last unrolled layer.
        vp_stage: the virtual stage, where recursion steps are virtual stages.

    Raises:
        ValueError: `layer_spec` is a recursion.
    """
    if config.mtp_num_layers is None:
        return None
    if layer_spec is not None and layer_spec.module is RecursionLayer:
        raise ValueError(
            "layer_spec is a recursion, but a head of multi-token prediction is a plain layer: Megatron "
            "reads the attention of a head's layer from its spec, and numbers heads from 1 again, so "
            "that two recursions would have one number in statistics and checkpoints. Leave layer_spec "
            "out, or pass the spec of a plain layer."
        )
    layer_spec = layer_spec or unrolled_layer_specs(config)[-1]
    norm = final_norm(layer_spec)
    is_local = norm is local_norm()
    block = get_gpt_mtp_block_spec(
        config, layer_spec, use_transformer_engine=not is_local, vp_stage=vp_stage
    )
    if block is None or not is_local:
        return block
    heads = []
    for head in block.layer_specs or ():
        parts = replace(cast(Any, head.submodules), enorm=norm, hnorm=norm, layer_norm=norm)
        heads.append(replace(head, submodules=parts))
    return replace(block, layer_specs=heads)
