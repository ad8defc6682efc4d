"""`--spec` for Megatron-LM's own pretrain_gpt.py.

The script takes the name of an object without settings for it, so the settings must be in the module
that defines the object. Write such a module, for example `my_spec.py` on the PYTHONPATH:

    from mor_megatron.models.megatron_lm import recursion_spec

    spec = recursion_spec("recursion.yaml")

and name it: `pretrain_gpt.py --spec my_spec spec --num-layers 8 ...`.
"""

from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)

from mor_layers import RecursionConfig, load_config
from mor_megatron.models.gpt import check_whole, default_layer_spec, recursion_parts


def recursion_spec(recursion: RecursionConfig | str | Path, dense_ends: bool = False) -> ModuleSpec:
    """A layer spec that becomes a Mixture-of-Recursions when Megatron builds `num_layers` of it.

    `num_layers` counts the unrolled depth. With pipeline stages, `--pipeline-model-parallel-layout` must
    not split a recursion; the error names a layout that fits.

    Args:
        recursion: the settings, or a YAML file with them.
        dense_ends: whether prelude and coda have dense MLPs although the model has experts.

    Raises:
        ValueError: settings are wrong, or the router needs updates after optimizer steps, because the
            script does not call `mor_megatron.update_routers`.
    """
    if not isinstance(recursion, RecursionConfig):
        recursion = load_config(RecursionConfig, recursion)
    if recursion.router.needs_updates:
        raise ValueError(
            f"{recursion.router} changes its state after each optimizer step, which needs a call "
            "of mor_megatron.update_routers in the training loop. For Megatron-LM's own script use "
            "warmup_steps=0, or balancing='loss'."
        )
    return ModuleSpec(
        module=UnrolledLayer, params={"recursion": recursion, "dense_ends": dense_ends}
    )


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
        """Returns the layer, which is not an UnrolledLayer and is therefore not initialised again."""
        inner = default_layer_spec(config)
        dense = default_layer_spec(config, is_moe=False) if dense_ends else inner
        parts = recursion_parts(config, recursion, inner, dense)
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
