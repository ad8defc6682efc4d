"""A small, complete decoder built from the parts of this library, and its settings."""

from mor_layers.models.config import DecoderConfig
from mor_layers.models.latent_attention import LatentAttentionConfig
from mor_layers.models.layers import DecoderLayer, DecoderStack
from mor_layers.models.limits import MOST_LAYERS, MOST_NUMBERS, MOST_TOKENS
from mor_layers.models.multi_token_prediction import MultiTokenPrediction
from mor_layers.models.prediction_heads import PredictionHead
from mor_layers.models.recursion_config import RecursionConfig, unrolled_lengths
from mor_layers.models.rope_scaling import (
    ROPE_SCALINGS,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    read_rope_scaling,
    write_rope_scaling,
)
from mor_layers.models.transformer import DecoderOutput, MoRTransformer

__all__ = [
    "MOST_LAYERS",
    "MOST_NUMBERS",
    "MOST_TOKENS",
    "ROPE_SCALINGS",
    "DecoderConfig",
    "DecoderLayer",
    "DecoderOutput",
    "DecoderStack",
    "LatentAttentionConfig",
    "LinearScaling",
    "Llama3Scaling",
    "MoRTransformer",
    "MultiTokenPrediction",
    "PredictionHead",
    "RecursionConfig",
    "RopeScaling",
    "YarnScaling",
    "read_rope_scaling",
    "unrolled_lengths",
    "write_rope_scaling",
]
