"""A small, complete decoder built from the parts of this library, and its settings."""

from mor_layers.models.config import DecoderConfig, RecursionConfig
from mor_layers.models.layers import DecoderLayer, DecoderStack
from mor_layers.models.transformer import DecoderOutput, MoRTransformer

__all__ = [
    "DecoderConfig",
    "DecoderLayer",
    "DecoderOutput",
    "DecoderStack",
    "MoRTransformer",
    "RecursionConfig",
]
