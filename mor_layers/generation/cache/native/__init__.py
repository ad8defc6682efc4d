"""Attention to a paged cache as a kernel for the processor at hand, which a C++ compiler makes once."""

from mor_layers.generation.cache.native.attention import PagedAttention, attends_natively

__all__ = ["PagedAttention", "attends_natively"]
