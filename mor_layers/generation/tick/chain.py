"""Models with several recursions in generation: a chain of cached models with one recursion each.

    embedding, prelude, recursion  ->  layers between, recursion  ->  layers between, recursion, coda

Each link has caches of its own, by the KV policy of its recursion, and a pool of tokens at its steps.
The layers between two recursions attend to all earlier tokens, as the coda does, so a span goes on to
the next link when all of its tokens have exited.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from mor_layers.generation.cache import Caches, CacheSettings
from mor_layers.generation.cache.caches import bytes_per_token
from mor_layers.generation.products import Products
from mor_layers.generation.tick.cached_model import CachedModel
from mor_layers.models import MoRTransformer


def cached_chain(
    model: MoRTransformer,
    settings: CacheSettings,
    products: Products | None = None,
    has_spare_slot: bool = False,
) -> list[CachedModel]:
    """The model with its caches, as one cached model for each of its recursions.

    The memory is divided so that all links are expected to run out at the same time. A model with one
    recursion, or none, is a chain of one link. The arguments are those of `CachedModel`.

    Raises:
        ValueError: as `CachedModel`.
    """
    products = products or Products()
    links = model.eval().chain()
    if len(links) == 1:
        return [CachedModel(model, settings, products, has_spare_slot)]
    steps = [link.config.effective_recursion.num_recursions for link in links]
    shares = _divided(settings.shares, steps)
    weights = [bytes_per_token(*pair) for pair in zip(links, shares, strict=True)]
    cached = []
    for link, own, weight in zip(links, shares, weights, strict=True):
        kv_bytes = max(1, int(settings.kv_bytes * weight / sum(weights)))
        # Prefixes are shared between texts by pages of one link, and their owners would differ.
        given = replace(settings, kv_bytes=kv_bytes, shares=own, prefix_sharing="off")
        cached.append(CachedModel(link, given, products, has_spare_slot))
    return cached


def _divided(
    shares: tuple[float, ...] | None, steps: Sequence[int]
) -> list[tuple[float, ...] | None]:
    """The shares of each recursion's steps."""
    if shares is None:
        return [None] * len(steps)
    if len(shares) != sum(steps):
        raise ValueError(
            f"shares={shares} must have {sum(steps)} entries, one for each of the "
            f"{' + '.join(map(str, steps))} steps of the recursions."
        )
    ends = [sum(steps[: index + 1]) for index in range(len(steps))]
    return [shares[end - count : end] for end, count in zip(ends, steps, strict=True)]


class ChainedCaches:
    """The caches of all links of a chain, as the scheduler and reports see them."""

    def __init__(self, settings: CacheSettings, links: Sequence[Caches]) -> None:
        self.settings, self.links = settings, links

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(caches.num_bytes for caches in self.links)

    @property
    def num_bytes_in_use(self) -> int:
        """Bytes of the pages that sequences use."""
        return sum(caches.num_bytes_in_use for caches in self.links)

    @property
    def num_bytes_idle(self) -> int:
        """Bytes of the pages that keep prefixes and that no sequence uses."""
        return sum(caches.num_bytes_idle for caches in self.links)

    @property
    def pages(self) -> tuple[int, ...]:
        """Number of pages, of each link for the layers that run once and for the recursion."""
        return self._joined(lambda caches: caches.pages)

    @property
    def pages_free(self) -> tuple[int, ...]:
        return self._joined(lambda caches: caches.pages_free)

    def demand(self, length: int) -> tuple[int, ...]:
        """Number of pages that a sequence is expected to need."""
        return self._joined(lambda caches: caches.demand(length))

    def _joined(self, read: Callable[[Caches], tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(count for caches in self.links for count in read(caches))


def caches_of(chain: Sequence[CachedModel], settings: CacheSettings) -> Caches | ChainedCaches:
    """The caches of a chain, made with these settings."""
    if len(chain) == 1:
        return chain[0].caches
    return ChainedCaches(settings, [cached.caches for cached in chain])
