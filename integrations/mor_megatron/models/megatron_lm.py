"""`--spec` for Megatron-LM's own pretrain_gpt.py and pretrain_hybrid.py.

The script takes the name of an object and no settings for it, so the settings must be in the module
that defines the object. Write such a module, for example `my_spec.py` on the PYTHONPATH:

    from mor_megatron.models.megatron_lm import recursion_builder

    spec = recursion_builder("recursion.yaml")

and name it: `pretrain_gpt.py --spec my_spec spec --num-layers 8 ...`.

`recursion_builder` returns a function that the script calls with its configuration, as the script
of Megatron-Core 0.19 does. For older scripts that do not, use `recursion_spec`. For pretrain_hybrid.py,
use `recursion_hybrid_stack`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
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
from mor_megatron.layers import log_routing, update_routers_automatically
from mor_megatron.models.gpt import (
    check_whole,
    default_layer_spec,
    file_keys_alike,
    final_norm,
    recursion_block_spec,
    recursion_parts,
    unrolled_layer_specs,
)
from mor_megatron.models.hybrid import RecursiveHybridStack, recursion_hybrid_spec
from mor_megatron.models.hybrid_pattern import HybridPattern

Recursions = RecursionConfig | str | Path | Sequence[RecursionConfig | str | Path]
"""The settings of a recursion or a YAML file with them, or several of these."""


def recursion_builder(
    recursion: Recursions, dense_ends: bool = False, logs_routing: bool = True
) -> Callable[..., TransformerBlockSubmodules]:
    """Return a function that makes the layers of a stage from the script's configuration.

    It divides the layers into pipeline stages unless the configuration does so, and uses a final
    norm that supports sequence parallelism. Routers are updated after each batch without a call,
    see `mor_megatron.update_routers_automatically`, and Megatron's log line and TensorBoard report
    on routing, see `mor_megatron.log_routing`.

    Args:
        recursion: the settings, or a YAML file with them; of several recursions a sequence of these.
        dense_ends: whether layers outside of recursions have dense MLPs although the model has experts.
        logs_routing: whether to add routing figures to Megatron's log, which takes two or three
            small reductions after each batch.
    """
    settings = _all_loaded(recursion)

    def spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        # The script passes its GPTModelConfig, which contains the TransformerConfig.
        config = getattr(config, "transformer", config)
        update_routers_automatically(config)
        if logs_routing:
            log_routing(config)
        dense = default_layer_spec(config, is_moe=False) if dense_ends else None
        return recursion_block_spec(config, settings, None, vp_stage, dense)

    return spec


def recursion_spec(
    recursion: Recursions, dense_ends: bool = False, logs_routing: bool = True
) -> ModuleSpec:
    """A layer spec that becomes a Mixture-of-Recursions when Megatron builds `num_layers` of it.

    `num_layers` counts the unrolled depth. With pipeline stages, `--pipeline-model-parallel-layout` must
    not split a recursion; the error names a layout that fits. Routers are updated and reported on after
    each batch as with `recursion_builder`.

    Args:
        recursion: the settings, or a YAML file with them; of several recursions a sequence of these.
        dense_ends: whether layers outside of recursions have dense MLPs although the model has experts.
        logs_routing: whether to add routing figures to Megatron's log. It does not happen where a
            pipeline stage has no layers, because nothing of this spec is built there.
    """
    params = {
        "recursion": _all_loaded(recursion),
        "dense_ends": dense_ends,
        "logs_routing": logs_routing,
    }
    return ModuleSpec(module=UnrolledLayer, params=params)


def recursion_hybrid_stack(
    pattern: str,
    recursions: Recursions,
    layers: HybridStackSubmodules | None = None,
    logs_routing: bool = True,
) -> ModuleSpec:
    """A stack spec that becomes a HybridModel's layers when Megatron builds it.

    pretrain_hybrid.py has to be told the same layers without brackets, in Megatron's own notation:
    `--hybrid-layer-pattern '*-*-*-*-*-*-*-*-'` for the pattern `*-[*-*-]x3*-`. Routers are updated and
    reported on after each batch as with `recursion_builder`.

    Args:
        pattern: see `mor_megatron.models.hybrid_pattern`.
        recursions: the settings, or YAML files with them, for all recursions or one for each.
        layers: specs by symbol, such as those of Megatron's `hybrid_stack_spec`; default:
            `default_hybrid_layers`.
        logs_routing: whether to add routing figures to Megatron's log.

    Raises:
        ValueError: `pattern` is none.
    """
    params = {
        "pattern": HybridPattern.parse(pattern),
        "recursions": _all_loaded(recursions),
        "layers": layers,
        "logs_routing": logs_routing,
    }
    return ModuleSpec(module=UnrolledHybridStack, params=params)


def _all_loaded(recursions: Recursions) -> RecursionConfig | list[RecursionConfig]:
    if isinstance(recursions, RecursionConfig | str | Path):
        return _loaded(recursions)
    return [_loaded(each) for each in recursions]


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
        recursion: RecursionConfig | Sequence[RecursionConfig],
        dense_ends: bool,
        logs_routing: bool,
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
        if logs_routing and _every_stage_has_layers(config):
            log_routing(config)
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


class UnrolledHybridStack(RecursiveHybridStack):
    """Builds the stack for a configuration, which its spec did not know yet."""

    def __new__(  # type: ignore[misc]
        cls,
        config: TransformerConfig,
        *,
        pattern: HybridPattern,
        recursions: RecursionConfig | Sequence[RecursionConfig],
        layers: HybridStackSubmodules | None,
        logs_routing: bool,
        **given: Any,
    ) -> Any:
        """Returns a RecursiveHybridStack, which is not an UnrolledHybridStack, initialised once."""
        spec = recursion_hybrid_spec(config, pattern, recursions, layers)
        update_routers_automatically(config)
        if logs_routing:
            log_routing(config)
        return build_module(spec, config=config, **given)


def _every_stage_has_layers(config: TransformerConfig) -> bool:
    layout = config.pipeline_model_parallel_layout
    if not isinstance(layout, PipelineParallelLayerLayout):
        return True
    return all(LayerType.decoder in stage for stages in layout.layout for stage in stages)


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
