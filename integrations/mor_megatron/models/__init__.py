"""Specs that put a recursion into Megatron's GPTModel and HybridModel."""

from mor_megatron.models.gpt import (
    default_layer_spec,
    final_norm,
    has_transformer_engine,
    recursion_block_spec,
)
from mor_megatron.models.mtp import mtp_block_spec

__all__ = [
    "default_layer_spec",
    "final_norm",
    "has_transformer_engine",
    "mtp_block_spec",
    "recursion_block_spec",
]
