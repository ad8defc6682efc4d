"""Pipeline parallelism in which each recursion step is a virtual pipeline stage."""

from mor_megatron.pipeline.rules import validate_pipeline
from mor_megatron.pipeline.spec import (
    connect_stages,
    recursion_forward_backward,
    recursion_pipeline_spec,
)

__all__ = [
    "connect_stages",
    "recursion_forward_backward",
    "recursion_pipeline_spec",
    "validate_pipeline",
]
