"""Keys and values of a recursion in Megatron's static inference context.

The rows of each (step, layer) are stored under the number of its unrolled layer, in the same format as
those of ordinary layers: `[S b g d]`, indexed by the position of the token. Multi-latent attention keeps
its latent rows and rotary parts in their place. A mask is stored as well, because a token has no row at
steps that it does not run. The tokens of a text can be passed all at
once or one by one. Routing is causal.

Legend: `S` largest sequence length, `b` batch, `k` tokens that run a step now, `m` positions up to the
last token, `x` tokens that just exited, `g` key-value heads of this rank, `d` head size.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from mor_layers import StepContext, Tokens
from mor_layers.recursion import Exited, KVPolicy


@dataclass(frozen=True)
class StaticCache:
    """The part of an inference context that one recursion uses in one forward pass."""

    memory: StaticInferenceContext
    policy: KVPolicy
    num_steps: int
    layers_per_step: int
    first_layer: int
    """Number of layers of the unrolled model before the recursion."""
    batch: int

    @property
    def columns(self) -> slice:
        """The sequences of this forward pass, as columns of the cache."""
        return slice(self.memory.batch_size_offset, self.memory.batch_size_offset + self.batch)

    def entering(self, length: int, device: torch.device) -> Tokens:
        """The tokens `[length b]` of this forward pass.

        Raises:
            ValueError: the inference context is too small for them.
        """
        start, memory = self.memory.sequence_len_offset, self.memory
        end, last = start + length, self.columns.stop
        if end > memory.max_sequence_length or last > memory.max_batch_size:
            raise ValueError(
                f"{last} sequences of {end} tokens exceed the inference context, which has "
                f"max_batch_size={memory.max_batch_size} and "
                f"max_sequence_length={memory.max_sequence_length}. Create a larger one."
            )
        if start == 0:  # a new text begins, so the rows of an earlier one are no longer valid
            for step in range(self.num_steps):
                self.is_kept(step, device)[:, self.columns] = False
        positions = torch.arange(start, end, device=device)[:, None].expand(length, self.batch)
        return Tokens(positions, end)

    def rows(self, step: int, layer: int, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The memory for keys and for values of a step and layer, each `[S b g d]` as `like`'s are."""
        number = self.first_layer + step * self.layers_per_step + layer + 1
        store = self.memory.key_value_memory_dict
        if number not in store:
            size = (self.memory.max_sequence_length, self.memory.max_batch_size)
            key, value = like
            store[number] = (
                key.new_zeros((*size, *key.shape[2:])),
                value.new_zeros((*size, *value.shape[2:])),
            )
        key, value = store[number]
        return key[:, self.columns], value[:, self.columns]

    def is_kept(self, step: int, device: torch.device) -> Tensor:
        """The positions that have a row at a step, `[S max_batch]`."""
        # Stored as a pair, like keys and values, so that Megatron's swap_key_value_dict reorders the
        # mask together with the rows.
        name, store = f"kept {self.first_layer} {step}", self.memory.key_value_memory_dict
        if name not in store:
            shape = (self.memory.max_sequence_length, self.memory.max_batch_size)
            kept = torch.zeros(shape, dtype=torch.bool, device=device)
            store[name] = (kept, kept)
        return store[name][0]


@dataclass(frozen=True)
class CachedStep(StepContext):
    """The context of a step that also sees the cached rows of all earlier tokens."""

    inner: StepContext
    cache: StaticCache

    @classmethod
    def of(cls, inner: StepContext, cache: StaticCache) -> "CachedStep":
        """Create the context, and mark the tokens that have rows at this step."""
        made = cls(inner.step, inner.tokens, inner, cache)
        if cache.policy == "recursion_wise" or inner.step == 0 or cache.policy == "exit_state":
            made._mark(inner.step, inner.tokens)
        if inner.exited is not None:
            for step in range(inner.step, cache.num_steps):
                made._mark(step, inner.exited.tokens)
        return made

    @property
    def key_positions(self) -> Tensor:
        places = torch.arange(self.tokens.sequence_length, device=self.tokens.positions.device)
        return places[:, None].expand(-1, self.tokens.positions.shape[1])

    @property
    def exited(self) -> Exited | None:
        return self.inner.exited

    @property
    def projects_keys(self) -> bool:
        return self.inner.projects_keys

    @property
    def seen_step(self) -> int:
        """The step whose rows are visible at this step."""
        return 0 if self.cache.policy in ("recursive_sharing", "sharing_with_update") else self.step

    def exchange(
        self, layer: int, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Store the new rows. Return those of all positions up to the last token, `[m b g d]`."""
        cache, end = self.cache, self.tokens.sequence_length
        if key is None or value is None:
            stored = cache.memory.key_value_memory_dict
            number = cache.first_layer + layer + 1
            keys, values = (rows[:, cache.columns] for rows in stored[number])
            return keys[:end], values[:end]
        own = cache.rows(self.step, layer, (key, value))
        if cache.policy == "sharing_with_update" and self.step > 0:
            start = cache.memory.sequence_len_offset
            for rows, first in zip(own, cache.rows(0, layer, (key, value)), strict=True):
                rows[start:end] = first[start:end]
        count = len(self.tokens.positions)
        for rows, new in zip(own, (key, value), strict=True):
            _put(rows, new[:count], self.tokens)
        if self.exited is not None:
            for step in range(self.step, cache.num_steps):
                for rows, new in zip(
                    cache.rows(step, layer, (key, value)), (key, value), strict=True
                ):
                    _put(rows, new[count:], self.exited.tokens)
        return own[0][:end], own[1][:end]

    @cached_property
    def causal_mask(self) -> Tensor:
        """`[b 1 k m]`, True where a query may see a position."""
        places = torch.arange(self.tokens.sequence_length, device=self.tokens.positions.device)
        positions = self.tokens.positions.T[:, :, None]  # [k b] -> [b k 1]
        kept = self.cache.is_kept(self.seen_step, places.device)[: len(places), self.cache.columns]
        is_seen = kept.T[:, None] & (places <= positions)
        # Every query sees itself, also padding, because an empty row of the softmax would give NaN.
        return (is_seen | (places == positions))[:, None]

    def _mark(self, step: int, tokens: Tokens) -> None:
        kept = self.cache.is_kept(step, tokens.positions.device)[:, self.cache.columns]
        real = torch.ones_like(tokens.positions, dtype=torch.bool)
        if tokens.is_padding is not None:
            real = ~tokens.is_padding
        columns = torch.arange(real.shape[1], device=real.device).expand_as(real)
        kept[tokens.positions[real], columns[real]] = True


def _put(rows: Tensor, new: Tensor, tokens: Tokens) -> None:
    """Set `rows[position, j] = new[i, j]` for each token, except for padding."""
    columns = torch.arange(new.shape[1], device=new.device).expand_as(tokens.positions)
    if tokens.is_padding is None:
        rows[tokens.positions, columns] = new
    else:
        real = ~tokens.is_padding
        rows[tokens.positions[real], columns[real]] = new[real]
