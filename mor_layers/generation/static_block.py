"""StaticBlock: the layers of a recursion as one compiled graph, for whatever is in flight.

Which token is at which step, what it writes and what it sees are values of tensors, never their shapes.
Shapes come in a few sizes, and a tick is padded to the next one. The graph is compiled once, without a
break, and compiled again for nothing that happens later. On a GPU, each combination of sizes is
recorded as a CUDA graph when it first occurs, and replayed afterwards.

Where an eager tick computes only what is chosen, the graph computes everything and selects: each token
runs the projections of every step, and every expert. A tick of decoding spends its time on reading
weights, which all have a token that needs them soon.

Routing, the layers outside of the recursion and sampling are not part of the graph.

Legend: `t` tokens in flight, `w` of them that may write a row, `m` rows seen, `n` query heads, `g`
key-value heads, `d` head size, `p` vectors of a head in a row, `h` hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.fx.experimental import _config as config

from mor_layers.generation.cache import CachePolicy, Entered, KVArena, TokensInFlight
from mor_layers.generation.cache.memory import quantized
from mor_layers.generation.graph_replay import Replay
from mor_layers.generation.watched import WatchedParameters
from mor_layers.models import DecoderStack
from mor_layers.recursion import Exited, StepContext
from mor_layers.selection import Tokens

Backend = str | Callable[..., Any]
"""A backend of `torch.compile`, or its name."""

FINEST = 8
"""Smallest size. Further sizes are multiples of it, at least an eighth apart."""


def padded_size(count: int) -> int:
    """The size that `count` things are padded to: at most an eighth more, or FINEST."""
    step = max(FINEST, 1 << max(0, count.bit_length() - 4))
    return max(FINEST, -(-count // step) * step)


@dataclass(frozen=True)
class StaticContext(StepContext):
    """What layers know about tokens in flight, `[t 1 h]`, in tensors of padded sizes."""

    step: Int[Tensor, "t 1"]  # type: ignore[assignment]
    data: Float[Tensor, "l v p g d"]
    """The memory of all layers' keys and values, or of their latent rows."""
    rows: Int[Tensor, " w"]
    """Rows of the first tokens."""
    is_written: Bool[Tensor, " w"]
    """Which of these rows get new keys and values; the others keep theirs."""
    table: Int[Tensor, "t m"]
    """Rows that each token sees."""
    is_seen: Bool[Tensor, "t m"]
    num_steps: int
    scales: Float[Tensor, "l v p g"] | None = None
    """Factors of an 8-bit memory."""
    exited: Exited | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    """Exited tokens whose rows are stored now, and padding, if the policy stores them."""
    sources: Int[Tensor, " w"] | None = None
    """For each row, which of the projected tokens it is of. Default: the first ones, in order."""
    projects_alike: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def keeps_latent_rows(self) -> bool:
        return True

    @property
    def has_static_shapes(self) -> bool:
        return True

    def rows_to_project(self, hidden: Tensor) -> Tensor:
        return hidden[: self.rows.shape[0]]

    def at_each_step(self, count: int, run: Callable[[int, slice], Tensor]) -> Tensor:
        # Every token runs every step, and its own step's result remains.
        every = torch.stack([run(step, slice(0, count)) for step in range(self.num_steps)])
        own = self.step[None, :count, :, None].expand(1, *every.shape[1:])
        return every.gather(0, own)[0]

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        assert key is not None
        new = torch.cat([key] if value is None else [key, value], dim=1)  # [w 1 g d] -> [w p g d]
        self._write(layer, new if self.sources is None else new.index_select(0, self.sources))
        seen = self._read(layer).to(query.dtype).unflatten(0, self.table.shape)
        vectors = seen.permute(2, 0, 3, 1, 4)  # [t m p g d] -> [p t g m d]
        keys, values = vectors[0], vectors[-1]  # the same where a row is both
        # Heads that share a key take the place of queries.
        grouped = query[:, 0].unflatten(1, (keys.shape[1], -1))  # [t n d] -> [t g n/g d]
        mask = self.is_seen[:, None, None]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return out.flatten(1, 2)[:, None]

    def _write(self, layer: int, new: Float[Tensor, "w p g d"]) -> None:
        if self.scales is None:
            self._put(self.data[layer], new)
            return
        numbers, scales = quantized(new)
        self._put(self.data[layer], numbers)
        self._put(self.scales[layer], scales)

    def _put(self, memory: Tensor, values: Tensor) -> None:
        # A row that is not written gets what it has, 8-bit integers too, which are not rounded again.
        is_written = self.is_written.view(-1, *[1] * (values.dim() - 1))
        kept = torch.where(is_written, values, memory.index_select(0, self.rows))
        memory.index_copy_(0, self.rows, kept)

    def _read(self, layer: int) -> Float[Tensor, "tm p g d"]:
        rows = self.table.flatten()
        seen = self.data[layer].index_select(0, rows)
        if self.scales is None:
            return seen
        return seen * self.scales[layer].index_select(0, rows)[..., None]


class StaticBlock:
    """The layers of a recursion, compiled for tokens at any steps.

    Args:
        layers: the shared stack.
        policy: which rows tokens write and see.
        arena: where the rows are.
        most: tokens above this number are left to the eager path: chunks of prompts share rows, which
            the graph would copy for each token.

    Raises:
        ValueError: the layers are no `DecoderStack`, or have hooks.
    """

    def __init__(
        self, layers: nn.Module, policy: CachePolicy, arena: KVArena, most: int, backend: Backend
    ) -> None:
        if (problem := _obstacle(layers)) is not None:
            raise ValueError(f"the block cannot be compiled: {problem}. Use compiler=None.")
        self.layers, self.policy, self.arena, self.most = layers, policy, arena, most
        self._run: Callable[..., Tensor] = torch.compile(
            self._layers, fullgraph=True, dynamic=True, backend=backend
        )
        self._replay = Replay(self._run) if arena.data.is_cuda else None
        self._parameters = WatchedParameters(layers)

    @property
    def num_recorded(self) -> int:
        """Number of CUDA graphs recorded so far; 0 on a CPU."""
        return 0 if self._replay is None else self._replay.num_recorded

    def __call__(
        self,
        hidden: Float[Tensor, "t h"],
        tokens: TokensInFlight,
        entered: Entered,
        exited: Exited | None = None,
    ) -> Float[Tensor, "t h"]:
        """The layers' output for tokens in flight. Their keys and values are written.

        Args:
            exited: tokens that have exited since the last tick, if the policy stores any.
        """
        count, visible = len(hidden), entered.visible
        size = padded_size(count)
        # Padding repeats the last token: it writes the same row with the same values once more.
        index = torch.arange(size, device=hidden.device).clamp(max=count - 1)
        seen = padded_size(int(visible.counts.max()))
        table = F.pad(
            visible.table[visible.lists, :seen], (0, max(0, seen - visible.table.shape[1]))
        )
        counts, place = visible.counts[index, None], torch.arange(seen, device=hidden.device)
        stored = ()
        if self.policy.keeps_exited:
            own, *stored = _with_exited(index, hidden, tokens, entered, exited)
            is_written = torch.ones_like(own, dtype=torch.bool)
        else:
            # Tokens that write nothing name a row that they see, which keeps its contents.
            writers = min(size, padded_size(len(entered.rows)))
            own = torch.cat([entered.rows, table[len(entered.rows) :, 0]])[index][:writers]
            is_written = (index < len(entered.rows))[:writers]
        if self._replay is not None and self._parameters.have_changed():
            self._replay.forget()
        run = self._run if self._replay is None else self._replay
        with config.patch(use_duck_shape=False):  # sizes that happen to be equal may differ later
            output = run(
                hidden[index],
                tokens.steps[index, None],
                tokens.positions[index, None],
                own,
                is_written,
                torch.where(place < counts, table[index], table[index, :1]),
                place < counts,
                *stored,
            )
        return output[:count]

    def _layers(
        self,
        hidden: Tensor,
        steps: Tensor,
        positions: Tensor,
        rows: Tensor,
        is_written: Tensor,
        table: Tensor,
        is_seen: Tensor,
        sources: Tensor | None = None,
        exited: Tensor | None = None,
        exited_positions: Tensor | None = None,
    ) -> Tensor:
        also = None
        if exited is not None and exited_positions is not None:
            also = Exited(Tokens(exited_positions, self.policy.max_length), exited)
        context = StaticContext(
            steps,
            Tokens(positions, self.policy.max_length),
            self.arena.data,
            rows,
            is_written,
            table,
            is_seen,
            self.policy.num_steps,
            self.arena.scales,
            also,
            sources,
            self.policy.projects_alike,
        )
        return self.layers(hidden[:, None], context)[:, 0]  # [t h] -> [t 1 h] -> [t h]


def _with_exited(
    index: Int[Tensor, " t"],
    hidden: Float[Tensor, "c h"],
    tokens: TokensInFlight,
    entered: Entered,
    exited: Exited | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is stored if the policy stores exited tokens: rows, whose they are, states, positions.

    Padding repeats the last exited token. If there is none, it repeats the last running one, whose state
    stands for no token and is not stored.

    Args:
        index: which running token each padded one repeats.
    """
    count, size = len(hidden), len(index)
    states, positions = hidden[-1:, None], tokens.positions[-1:, None]
    num_exited = len(entered.rows) - count
    if exited is not None and num_exited:
        states, positions = exited.hidden, exited.tokens.positions
    place = torch.arange(padded_size(num_exited), device=hidden.device)
    place = place.clamp(max=max(0, num_exited - 1))
    own = torch.arange(size, device=hidden.device)
    sources = size + place if num_exited else torch.full_like(place, size - 1)
    repeated = count + place if num_exited else torch.full_like(place, count - 1)
    rows = entered.rows[torch.cat([index, repeated])]
    return rows, torch.cat([own, sources]), states[place], positions[place]


def _obstacle(layers: nn.Module) -> str | None:
    """Why the layers cannot be one graph, if they cannot."""
    if not isinstance(layers, DecoderStack):
        return f"its layers are a {type(layers).__name__}"
    if any(module._forward_hooks for module in layers.modules()):
        return "its modules have hooks, such as sums over ranks"
    return None
