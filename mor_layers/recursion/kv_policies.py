"""What attention sees at a recursion step under each KV policy.

Legend: `b` batch, `k` tokens that run the step (queries), `m` tokens whose keys they see,
`n` query heads, `g` key-value heads, `d` head size.

| policy                | keys and values at step r                            | projects |
|-----------------------|------------------------------------------------------|----------|
| `recursion_wise`      | of the tokens that run r                             | q, k, v  |
| `recursive_sharing`   | of all tokens that ran step 1, computed there        | q        |
| `sharing_with_update` | as sharing, the rows of tokens that run r recomputed | q, k, v  |
| `exit_state`          | of the tokens that run r, and of every token that    | q, k, v  |
|                       | exited before r from the state it keeps              |          |

Source: arXiv 2507.10524, section 2.2.2; `exit_state` is ours. Under `sharing_with_update` every step
starts from step 1's rows, as in the released implementation. Under `exit_state` each layer projects
the state of a token once, when the token exits, and later steps reuse the rows: a step projects
`q, k, v` for the tokens that run it and `k, v` for the tokens that have just exited.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor_layers.recursion.attention import attend, causal_mask, is_plain_causal, visible
from mor_layers.recursion.block_masks import attends_by_blocks, block_mask
from mor_layers.recursion.expert_use import ExpertRecorder, ExpertUse
from mor_layers.selection import Tokens, put_rows, take_rows

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

KVPolicy = Literal["recursion_wise", "recursive_sharing", "sharing_with_update", "exit_state"]
KV_POLICIES: tuple[str, ...] = get_args(KVPolicy)


class Products(Protocol):
    """Computes the matrix products of layers in their place; see `mor_layers.generation.products`."""

    def __call__(
        self, projections: tuple[Any, ...], hidden: Float[Tensor, "k b i"], context: "StepContext"
    ) -> tuple[Float[Tensor, "k b o"], ...]:
        """The output of each projection for all rows of `hidden`."""
        ...

    def expert(
        self, experts: Any, index: int, hidden: Float[Tensor, "t h"]
    ) -> Float[Tensor, "t h"]:
        """The output of one expert of a mixture."""
        ...

    def chosen_experts(
        self, experts: Any, hidden: Float[Tensor, "t h"], assignment: Any
    ) -> Float[Tensor, "t h"] | None:
        """The output of a mixture, as one operation of a graph; None if there is no such operation."""
        ...


@dataclass(frozen=True)
class Exited:
    """The tokens that exited after the previous step, and their final states."""

    tokens: Tokens
    hidden: Float[Tensor, "x b h"]


@dataclass(frozen=True)
class StepContext:
    """What the layers of a block know about the step they run.

    This base class implements the `recursion_wise` policy. A context is frozen, because the step and
    its tokens do not change. Two things are filled while the pass runs: layers pass keys and values to
    `exchange`, which some policies put into a `store`, and a mixture of experts records its statistics
    in `experts`.
    """

    step: int
    """0-based recursion step."""
    tokens: Tokens
    """The tokens whose states the layers get."""
    # Not the class itself as the factory: torch.compile makes objects only of classes that it
    # finds by name.
    experts: ExpertRecorder = field(default_factory=lambda: ExpertRecorder(), kw_only=True)
    """Where layers record what their experts did."""
    _block_masks: dict[int | None, Any] = field(default_factory=dict, kw_only=True, repr=False)
    """The block masks made so far, by window."""

    @property
    def expert_use(self) -> dict[int, ExpertUse]:
        """What the experts of each layer did at this step, by layer, as far as it has run."""
        return self.experts.uses

    @property
    def keys(self) -> Tokens:
        """The tokens whose keys and values the step's queries may see."""
        return self.tokens

    @property
    def key_positions(self) -> Int[Tensor, "m b"]:
        """Positions in the sequence of what the step's queries may see, in the order of `exchange`."""
        return self.keys.positions

    @property
    def projects_keys(self) -> bool:
        """Whether layers have to compute keys and values at this step."""
        return True

    @property
    def projects_alike(self) -> bool:
        """Whether queries, keys and values are all computed for exactly the tokens of the step."""
        return True

    @property
    def keeps_latent_rows(self) -> bool:
        """Whether latent attention attends to latent rows themselves, by `attend`, and not to keys and
        values that it projects from what `exchange` returns."""
        return False

    @property
    def exited(self) -> Exited | None:
        """Further tokens whose keys and values layers must compute; None when there are none."""
        return None

    @property
    def projected_positions(self) -> Int[Tensor, "kx b"]:
        """Positions of the rows that `with_exited` returns."""
        exited, own = self.exited, self.tokens.positions
        return own if exited is None else torch.cat([own, exited.tokens.positions])

    def with_exited(self, hidden: Float[Tensor, "k b h"]) -> Float[Tensor, "kx b h"]:
        """All rows whose keys and values a layer computes: the running tokens, then `exited`."""
        return hidden if self.exited is None else torch.cat([hidden, self.exited.hidden])

    # The hooks below are trivial here, where all rows run one step. They stand in the base
    # class because a layer is written once, for training and for generation, and generation
    # batches tokens that are at different steps.

    @property
    def products(self) -> Products | None:
        """What computes the layers' products; None if they do it themselves."""
        return None

    def rows_by_step(self, count: int) -> list[tuple[int, slice]]:
        """Which of the first `count` rows run which step; rows of one step stand together."""
        return [(self.step, slice(0, count))]

    def at_each_step(
        self, count: int, run: Callable[[int, slice], Float[Tensor, "j b o"]]
    ) -> Float[Tensor, "k b o"]:
        """What `run` makes of the first `count` rows, each at its own step.

        Args:
            run: from a step and the rows that run it to its output for these rows.
        """
        parts = [run(step, rows) for step, rows in self.rows_by_step(count)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def has_static_shapes(self) -> bool:
        """Whether shapes must not depend on what tokens are routed to."""
        return False

    def rows_to_project(self, hidden: Float[Tensor, "kx b h"]) -> Float[Tensor, "w b h"]:
        """Of the rows of `with_exited`, the first ones: those that need keys and values."""
        return hidden

    def exchange(
        self,
        layer: int,
        key: Float[Tensor, "kx b g d"] | None,
        value: Float[Tensor, "kx b g d"] | None,
    ) -> tuple[Float[Tensor, "m b g d"], Float[Tensor, "m b g d"]]:
        """Take the keys and values that a layer projected, and return those that it attends to.

        Rotary embeddings have already been applied.

        Args:
            layer: 0-based index of the layer in the block.
            key, value: for the rows of `with_exited`; None if and only if `projects_keys` is False.
        """
        assert key is not None and value is not None
        return key, value

    @cached_property
    def causal_mask(self) -> Bool[Tensor, "b 1 k m"] | None:
        """True where a query may see a key; None if plain causal attention is equivalent."""
        return causal_mask(self.tokens, self.keys)

    @property
    def masks_by_tokens(self) -> bool:
        """Whether `causal_mask` follows from `tokens` and `keys`, as block masks do. Contexts whose keys
        are stored in another way have a mask of their own.
        """
        return type(self).causal_mask is StepContext.causal_mask

    def block_mask(self, window: int | None = None) -> "BlockMask | None":
        """`causal_mask` for FlexAttention, made once for all layers; None if plain causal attention is
        equivalent.

        Args:
            window: how many positions before its own a query sees; None: all of them.
        """
        if window not in self._block_masks:
            self._block_masks[window] = self._new_block_mask(window)
        return self._block_masks[window]

    def _new_block_mask(self, window: int | None) -> "BlockMask | None":
        if window is None and is_plain_causal(self.tokens, self.keys):
            return None
        return block_mask(self.tokens, self.keys, window)

    def mask_for(
        self,
        query: Float[Tensor, "k b n d"],
        key: Float[Tensor, "m b g d"],
        value: Float[Tensor, "m b g v"],
    ) -> "Bool[Tensor, 'b 1 k m'] | BlockMask | None":
        """What the attention of these queries to what `exchange` returned needs as a mask: a block mask
        where FlexAttention is used."""
        if self.masks_by_tokens and attends_by_blocks(query, key, value):
            return self.block_mask()
        return self.causal_mask

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "k b n d"],
        key: Float[Tensor, "kx b g d"] | None,
        value: Float[Tensor, "kx b g d"] | None,
    ) -> Float[Tensor, "k b n d"]:
        """Attention to the keys and values that `exchange` returns."""
        key, value = self.exchange(layer, key, value)
        return attend(query, key, value, self.mask_for(query, key, value))


@dataclass(frozen=True)
class SharingContext(StepContext):
    """Recursive sharing: every step uses the keys and values of step 1."""

    first: Tokens
    """The tokens that ran step 1."""
    store: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values of step 1 by layer; kept for one forward pass."""

    @property
    def keys(self) -> Tokens:
        return self.first

    @property
    def projects_keys(self) -> bool:
        return self.step == 0

    @property
    def projects_alike(self) -> bool:
        return self.projects_keys

    def exchange(
        self, layer: int, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.step == 0:
            assert key is not None and value is not None
            self.store[layer] = (key, value)
        return self.store[layer]


@dataclass(frozen=True)
class UpdatingContext(SharingContext):
    """Sharing with update: recursive sharing, but the rows of the running tokens are recomputed."""

    @property
    def projects_keys(self) -> bool:
        return True

    def exchange(
        self, layer: int, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        shared_key, shared_value = super().exchange(layer, key, value)
        if self.step == 0:
            return shared_key, shared_value
        assert key is not None and value is not None
        return self._update(shared_key, key), self._update(shared_value, value)

    def _update(self, shared: Tensor, fresh: Tensor) -> Tensor:
        rows = self._rows_in_first
        if self.tokens.is_padding is not None:  # a padding slot has no state to write
            is_padding = self.tokens.is_padding[..., None, None]
            fresh = torch.where(is_padding, take_rows(shared, rows), fresh)
        return put_rows(shared, fresh, rows)

    @cached_property
    def _rows_in_first(self) -> Int[Tensor, "k b"]:
        return self.first.rows_of(self.tokens)


@dataclass(frozen=True)
class ExitStateContext(StepContext):
    """Exit state: the rows of the running tokens, then those of all tokens that exited earlier."""

    exited: Exited | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    """The tokens that ran the previous step (at step 1: all tokens) and do not run this one."""
    exited_tokens: tuple[Tokens, ...] = ()
    """All tokens that have exited, one entry per step at which some did; this step's is the last."""
    store: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values by layer and entry of `exited_tokens`; kept for one forward pass."""

    @property
    def projects_alike(self) -> bool:
        return False

    @cached_property
    def keys(self) -> Tokens:  # type: ignore[override]
        return concatenated([self.tokens, *self.exited_tokens])

    def exchange(
        self, layer: int, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert key is not None and value is not None
        count, last = self.tokens.shape[0], len(self.exited_tokens) - 1
        if self.exited is not None:
            if len(key) != count + self.exited.tokens.shape[0]:
                raise ValueError(
                    f"layer {layer} projected {len(key)} keys; kv_policy='exit_state' needs "
                    f"{count + self.exited.tokens.shape[0]}, those of context.with_exited(hidden)."
                )
            self.store[layer, last] = (key[count:], value[count:])
        rows = [(key[:count], value[:count])]
        rows += [self.store[layer, entry] for entry in range(last + 1)]
        keys, values = zip(*rows, strict=True)
        return (keys[0], values[0]) if last < 0 else (torch.cat(keys), torch.cat(values))

    @cached_property
    def causal_mask(self) -> Bool[Tensor, "b 1 k m"] | None:
        if not self.exited_tokens:
            return causal_mask(self.tokens, self.tokens)
        mask = visible(self.tokens, self.keys)
        # The diagonal, and not "the key at the same position": a padding slot may have that too.
        own = torch.eye(*mask.shape[1:], dtype=torch.bool, device=mask.device)
        return (mask | own)[:, None]

    @property
    def masks_by_tokens(self) -> bool:
        return True

    def _new_block_mask(self, window: int | None) -> "BlockMask | None":
        if not self.exited_tokens:
            return super()._new_block_mask(window)
        return block_mask(self.tokens, self.keys, window, own_row=True)


def concatenated(parts: list[Tokens]) -> Tokens:
    """The rows of several selections of the same sequences, concatenated and not sorted."""
    if len(parts) == 1:
        return parts[0]
    is_padding = None
    if any(part.is_padding is not None for part in parts):
        is_padding = torch.cat(
            [
                torch.zeros_like(part.positions, dtype=torch.bool)
                if part.is_padding is None
                else part.is_padding
                for part in parts
            ]
        )
    documents = [part.documents for part in parts if part.documents is not None]
    return Tokens(
        torch.cat([part.positions for part in parts]),
        parts[0].sequence_length,
        torch.cat(documents) if documents else None,
        is_padding,
        padding_trails=False,
    )


def begin_step(
    policy: KVPolicy,
    step: int,
    tokens: Tokens,
    earlier: StepContext | None,
    exited: Exited | None = None,
) -> StepContext:
    """The context of a step under a policy.

    Args:
        earlier: the context of the step before.
        exited: under `exit_state`, the candidates of this step that do not run it.
    """
    if policy == "recursion_wise":
        return StepContext(step, tokens)
    if policy == "exit_state":
        assert earlier is None or isinstance(earlier, ExitStateContext)
        before = () if earlier is None else earlier.exited_tokens
        now = () if exited is None else (exited.tokens,)
        store = {} if earlier is None else earlier.store
        return ExitStateContext(step, tokens, exited, before + now, store)
    kind = SharingContext if policy == "recursive_sharing" else UpdatingContext
    if earlier is None:
        return kind(step, tokens, first=tokens)
    assert isinstance(earlier, kind)
    return kind(step, tokens, earlier.first, earlier.store)
