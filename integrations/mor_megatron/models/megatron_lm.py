"""`--spec` for Megatron-LM's own pretrain_gpt.py.

The script takes the name of an object and no settings for it, so the settings must be in the module
that defines the object. Write such a module, for example `my_spec.py` on the PYTHONPATH:

    from mor_megatron.models.megatron_lm import recursion_builder

    spec = recursion_builder("recursion.yaml")

and name it: `pretrain_gpt.py --spec my_spec spec --num-layers 8 ...`.

`recursion_builder` returns a function that the script calls with its configuration, as the script
of Megatron-Core 0.19 does. For scripts that do not (those with a gpt_builders.py beside them), use
`recursion_spec`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)

from mor_layers import RecursionConfig, load_config
from mor_megatron.layers import update_routers_automatically
from mor_megatron.models.gpt import (
    check_whole,
    default_layer_spec,
    file_keys_alike,
    final_norm,
    recursion_block_spec,
    recursion_parts,
    unrolled_layer_specs,
)


def recursion_builder(
    recursion: RecursionConfig | str | Path, dense_ends: bool = False
) -> Callable[..., TransformerBlockSubmodules]:
    """Return a function that makes the layers of a stage from the script's configuration.

    It divides the layers into pipeline stages unless the configuration does so, and uses a final
    norm that supports sequence parallelism. Routers are updated after each batch without a call,
    see `mor_megatron.update_routers_automatically`.

    Args:
        recursion: the settings, or a YAML file with them.
        dense_ends: whether prelude and coda have dense MLPs although the model has experts.
    """
    settings = _loaded(recursion)

    def spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        # The script passes its GPTModelConfig, which contains the TransformerConfig.
        config = getattr(config, "transformer", config)
        update_routers_automatically(config)
        dense = default_layer_spec(config, is_moe=False) if dense_ends else None
        return recursion_block_spec(config, settings, None, vp_stage, dense)

    return spec


def recursion_spec(recursion: RecursionConfig | str | Path, dense_ends: bool = False) -> ModuleSpec:
    """A layer spec that becomes a Mixture-of-Recursions when Megatron builds `num_layers` of it.


    `num_layers` counts the unrolled depth. With pipeline stages, `--pipeline-model-parallel-layout` must
    not split a recursion; the error names a layout that fits. Routers are updated after each batch
    without a call, see `mor_megatron.update_routers_automatically`.

    Args:
        recursion: the settings, or a YAML file with them.
        dense_ends: whether prelude and coda have dense MLPs although the model has experts.
    """
    return ModuleSpec(
        module=UnrolledLayer, params={"recursion": _loaded(recursion), "dense_ends": dense_ends}
    )


def _loaded(recursion: RecursionConfig | str | Path) -> RecursionConfig:
    if isinstance(recursion, RecursionConfig):
        return recursion
    return load_config(RecursionConfig, recursion)


class UnrolledLayer(TransformerLayer):
    """Builds the entry of the layer list for its layer number."""

    def __new__(  # type: ignore[misc]
        cls,
        config: TransformerConfig,
        layer_number: int,
        recursion: RecursionConfig,
        dense_ends: bool,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> Any:
        """Return the layer, which is not an UnrolledLayer and is therefore not initialised again.

        Raises:
            ValueError: sequence parallelism is used with a final norm that does not support it.
        """
        specs = unrolled_layer_specs(config)
        _require_final_norm(config, specs[-1])
        file_keys_alike(config)
        update_routers_automatically(config)
        dense = default_layer_spec(config, is_moe=False) if dense_ends else None
        parts = recursion_parts(config, recursion, specs, dense)
        first = get_transformer_layer_offset(config, vp_stage)
        count = get_num_layers_to_build(config, vp_stage)
        check_whole(config, [len(part) for part in parts], first, count)
        entries = [spec for part in parts for spec in part]
        return build_module(
            entries[first + layer_number - 1],
            config=config,
            layer_number=layer_number,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )


def _require_final_norm(config: TransformerConfig, last: ModuleSpec) -> None:
    """Raise ValueError if the block would use PyTorch's norm, which does not support sequence
    parallelism.

    Megatron itself chooses the final norm of a model that is built from one layer spec, and the
    spec cannot name another.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import LayerNormImpl

    if config.sequence_parallel and LayerNormImpl is WrappedTorchNorm:
        raise ValueError(
            "sequence_parallel=True with recursion_spec needs Transformer Engine or apex: without "
            "them Megatron uses PyTorch's norm after the last layer, which does not support "
            f"sequence parallelism, and a layer spec cannot name {final_norm(last).__name__}. Use "
            "recursion_builder instead of recursion_spec."
        )
