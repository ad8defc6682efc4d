"""StaticBlock: the layers of a recursion as one compiled graph, for whatever is in flight.

Which token is at which step, what it writes and what it sees are values of tensors, never their shapes.
Shapes come in a few sizes, and a tick is padded to the next one. The graph is compiled once, without a
break, and compiled again for nothing that happens later. On a GPU, each combination of sizes is
recorded as a CUDA graph when it first occurs, and replayed afterwards.

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
from mor_layers.generation.graph_replay import Replay
from mor_layers.generation.watched import WatchedParameters
from mor_layers.layers import MoE, RelaxedLinear, StepLinear
from mor_layers.models import DecoderStack
from mor_layers.recursion import StepContext
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
    projects_alike: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def keeps_latent_rows(self) -> bool:
        return True

    def rows_to_project(self, hidden: Tensor) -> Tensor:
        return hidden[: self.rows.shape[0]]

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        assert key is not None
        data, vectors = self.data[layer], [key] if value is None else [key, value]
        new = torch.cat(vectors, dim=1)  # [w 1 g d] -> [w p g d]
        new = torch.where(
            self.is_written[:, None, None, None], new, data.index_select(0, self.rows)
        )
        data.index_copy_(0, self.rows, new)
        seen = data.index_select(0, self.table.flatten()).view(*self.table.shape, *data.shape[1:])
        vectors = seen.permute(2, 0, 3, 1, 4)  # [t m p g d] -> [p t g m d]
        keys, values = vectors[0], vectors[-1]  # the same where a row is both
        # Heads that share a key take the place of queries.
        grouped = query[:, 0].unflatten(1, (keys.shape[1], -1))  # [t n d] -> [t g n/g d]
        mask = self.is_seen[:, None, None]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return out.flatten(1, 2)[:, None]


class StaticBlock:
    """The layers of a recursion, compiled for tokens at any steps.

    Args:
        layers: the shared stack.
        policy: which rows tokens write and see.
        arena: where the rows are.
        most: tokens above this number are left to the eager path: chunks of prompts share rows, which
            the graph would copy for each token.

    Raises:
        ValueError: shapes depend on the steps of the tokens in these layers.
    """

    def __init__(
        self, layers: nn.Module, policy: CachePolicy, arena: KVArena, most: int, backend: Backend
    ) -> None:
        if (problem := _obstacle(layers, policy, arena)) is not None:
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
        self, hidden: Float[Tensor, "t h"], tokens: TokensInFlight, entered: Entered
    ) -> Float[Tensor, "t h"]:
        """The layers' output for tokens in flight. Their keys and values are written."""
        count, visible = len(hidden), entered.visible
        size = padded_size(count)
        # Padding repeats the last token: it writes the same row with the same values once more.
        index = torch.arange(size, device=hidden.device).clamp(max=count - 1)
        seen = padded_size(int(visible.counts.max()))
        table = F.pad(
            visible.table[visible.lists, :seen], (0, max(0, seen - visible.table.shape[1]))
        )
        counts, place = visible.counts[index, None], torch.arange(seen, device=hidden.device)
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
    ) -> Tensor:
        context = StaticContext(
            steps,
            Tokens(positions, self.policy.max_length),
            self.arena.data,
            rows,
            is_written,
            table,
            is_seen,
            self.policy.projects_alike,
        )
        return self.layers(hidden[:, None], context)[:, 0]  # [t h] -> [t 1 h] -> [t h]


def _obstacle(layers: nn.Module, policy: CachePolicy, arena: KVArena) -> str | None:
    """Why shapes depend on the tokens' steps, if they do."""
    if not isinstance(layers, DecoderStack):
        return f"its layers are a {type(layers).__name__}"
    if policy.keeps_exited:
        return "kv_policy='exit_state' projects as many exited tokens as there are"
    if arena.scales is not None:
        return "an 8-bit cache would be rounded again"
    modules = list(layers.modules())
    if any(module._forward_hooks for module in modules):
        return "its modules have hooks, such as sums over ranks"
    if any(isinstance(module, MoE) for module in modules):
        return "experts get as many tokens as choose them"
    if any(isinstance(module, RelaxedLinear | StepLinear) for module in modules):
        return "projections of single steps get as many tokens as are at the step"
    return None
