"""The rows of one recursion step: positions, documents, placement on ranks, and caches."""

from mor_megatron.step.context_parallel import (
    GatheredStep,
    Relayout,
    in_sequence_order,
    zigzag_positions,
)
from mor_megatron.step.documents import documents_of
from mor_megatron.step.packed_input import PackedDocuments, packed_documents, require_no_mask
from mor_megatron.step.packing import attend_packed, packed, takes_packed
from mor_megatron.step.placement import SequenceParallelPlacement, padded, shard_of_padding
from mor_megatron.step.rotation import StepRotation
from mor_megatron.step.static_cache import CachedStep, StaticCache

__all__ = [
    "CachedStep",
    "GatheredStep",
    "PackedDocuments",
    "Relayout",
    "SequenceParallelPlacement",
    "StaticCache",
    "StepRotation",
    "attend_packed",
    "documents_of",
    "in_sequence_order",
    "packed",
    "packed_documents",
    "padded",
    "require_no_mask",
    "shard_of_padding",
    "takes_packed",
    "zigzag_positions",
]
