"""The rules of parallel layouts and how a layout divides a model, without Megatron-Core, and what
Megatron's settings are for a rotary embedding of ours.

The planner, the pretraining settings and the layers all use this code, so that they agree. Nothing
in this package imports Megatron-Core, so a run can be planned on a laptop that does not have it.
"""

from mor_megatron.parallel.carried import CarriedRows
from mor_megatron.parallel.rotary import RotarySettings, rotary_settings
from mor_megatron.parallel.rules import (
    BATCH_RULES,
    LAYOUT_RULES,
    SEPARATE_LAYERS_RULES,
    STEPS_AS_STAGES_RULES,
    TAUGHT_EXITS_RULES,
    Arrangement,
    Names,
    PipelineLayout,
    Rule,
    broken_rule,
    require_rules,
)
from mor_megatron.parallel.stages import blocks_per_part, even_stages

__all__ = [
    "BATCH_RULES",
    "LAYOUT_RULES",
    "SEPARATE_LAYERS_RULES",
    "STEPS_AS_STAGES_RULES",
    "TAUGHT_EXITS_RULES",
    "Arrangement",
    "CarriedRows",
    "Names",
    "PipelineLayout",
    "RotarySettings",
    "Rule",
    "blocks_per_part",
    "broken_rule",
    "even_stages",
    "require_rules",
    "rotary_settings",
]
