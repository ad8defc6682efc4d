"""The paged cache of keys and values for generation, with one implementation per KV policy."""

from mor_layers.generation.cache.attention import CachedAttention, CachedContext, is_read_by_kernel
from mor_layers.generation.cache.caches import Caches, CacheSettings
from mor_layers.generation.cache.memory import KVArena, PagedRows
from mor_layers.generation.cache.policies import (
    CACHE_POLICIES,
    CachePolicy,
    Entered,
    TokensInFlight,
    Visible,
)

__all__ = [
    "CACHE_POLICIES",
    "CachePolicy",
    "CacheSettings",
    "CachedAttention",
    "CachedContext",
    "Caches",
    "Entered",
    "KVArena",
    "PagedRows",
    "TokensInFlight",
    "Visible",
    "is_read_by_kernel",
]
