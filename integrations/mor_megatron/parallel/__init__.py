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
    SEVERAL_STAGES_RULES,
    STEPS_AS_STAGES_RULES,
    Arrangement,
    Names,
    PipelineLayout,
    Rule,
    broken_rule,
    require_rules,
)
from mor_megatron.parallel.stages import even_stages

__all__ = [
    "BATCH_RULES",
    "LAYOUT_RULES",
    "SEVERAL_STAGES_RULES",
    "STEPS_AS_STAGES_RULES",
    "Arrangement",
    "CarriedRows",
    "Names",
    "PipelineLayout",
    "RotarySettings",
    "Rule",
    "broken_rule",
    "even_stages",
    "require_rules",
    "rotary_settings",
]
