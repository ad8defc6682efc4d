"""The platform that Megatron-Core runs on: ranks, CPUs, Transformer Engine and apex."""

from mor_megatron.platform.apex import has_apex
from mor_megatron.platform.ranks import on_first_rank
from mor_megatron.platform.transformer_engine import has_transformer_engine

__all__ = ["has_apex", "has_transformer_engine", "on_first_rank"]
