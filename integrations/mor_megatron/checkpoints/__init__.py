"""Checkpoints of training runs, and the conversion of weights to and from them."""

from mor_megatron.checkpoints.models import describe, open_checkpoint
from mor_megatron.checkpoints.shards import load_tensors, whole_tensors
from mor_megatron.checkpoints.weights import decoder_tensors, megatron_view

__all__ = [
    "decoder_tensors",
    "describe",
    "load_tensors",
    "megatron_view",
    "open_checkpoint",
    "whole_tensors",
]
