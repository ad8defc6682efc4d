"""What a parallel layout may be and how it divides a model, counted without Megatron-Core.

The planner, the pretraining settings and the layers themselves ask the same code. Nothing in this
package imports Megatron-Core, so that a laptop without it can plan a run.
"""

from mor_megatron.parallel.carried import CarriedRows
from mor_megatron.parallel.rules import (
    BATCH_RULES,
    LAYOUT_RULES,
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
    "STEPS_AS_STAGES_RULES",
    "Arrangement",
    "CarriedRows",
    "Names",
    "PipelineLayout",
    "Rule",
    "broken_rule",
    "even_stages",
    "require_rules",
]
