"""Hyper-connections over loops: several residual streams, which each step reads and writes.

    S = (H_1, ..., H_1)                            n streams, as the recursion begins
    x = Σ_j read_j · S_j                           what enters the layers of a step
    S_j <- keep_j · S_j + write_j · f(x)           after the step; f includes its own residual stream
    H = mean of S_j                                what leaves the recursion, and what routers score

    read, write / 2, keep = σ(scale · W_r rmsnorm(S) + b_r)     n numbers each, of each token
    static mixing: σ(b_r)

One stream would have to carry what a loop found and what it began with. With several, a recurrence is
worth r^0.65 unique blocks instead of r^0.46 (arXiv 2604.21106), for a few numbers per token and step.

Sources: Hyperloop Transformers (arXiv 2604.21254), which connects streams after each loop only, by a
diagonal instead of a full matrix between streams; mHC (arXiv 2512.24880) for sigmoid gates, W on the
flattened streams, and a learned scale that starts at 0.01. Where we differ: at the start read = 1/n,
write = 1 and keep = 0.0003, all but for small random numbers that tell the streams apart, so that a new
model computes nearly what the plain loop does. Under a router, what it gates is the whole update of the
streams. Embeddings of loops are `step_embeddings`.

Legend: `n` streams, `h` hidden, `t` tokens (any leading dimensions), `r` recursion steps.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mor_layers.routers.loop_state import Combine, LoopState
from mor_layers.settings import check_types, require_choice

Mixing = Literal["static", "dynamic"]
MOST_STREAMS = 64


@dataclass(frozen=True)
class HyperConnections:
    """Settings of residual streams over the steps of a recursion."""

    streams: int = 4
    """Number of residual streams (n), from 2 to 64."""
    mixing: Mixing = "dynamic"
    """Whether read, write and keep depend on the token's streams (`dynamic`) or on the step alone
    (`static`)."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 2 <= self.streams <= MOST_STREAMS:
            raise ValueError(
                f"HyperConnections.streams={self.streams} must lie in 2..{MOST_STREAMS}. For one "
                "stream, leave hyper_connections out."
            )
        require_choice("HyperConnections", "mixing", self.mixing, get_args(Mixing))


class StreamMixer(nn.Module):
    """How one step reads and writes the streams."""

    def __init__(self, hidden_size: int, config: HyperConnections) -> None:
        super().__init__()
        n = self.num_streams = config.streams
        start = torch.tensor([-math.log(n - 1), 0.0, -8.0]).repeat_interleave(n)
        self.bias = nn.Parameter(start + 0.02 * torch.randn(3 * n))
        self.weight = self.scale = None
        if config.mixing == "dynamic":
            self.weight = nn.Parameter(torch.empty(3 * n, n * hidden_size).normal_(std=0.02))
            self.scale = nn.Parameter(torch.full((3,), 0.01))

    def forward(self, wide: Float[Tensor, "*t nh"], is_before: bool) -> tuple[Tensor, ...]:
        """`read` before the step, or `write / 2` and `keep` after it: `[*t n 1]` each, in fp32.

        Under static mixing they have no dimensions of tokens.
        """
        n = self.num_streams
        rows = slice(0, n) if is_before else slice(n, 3 * n)
        logits = self.bias[rows].float()
        if self.weight is not None and self.scale is not None:
            normed = F.rms_norm(wide.float(), wide.shape[-1:], eps=1e-6)
            scale = self.scale.float().repeat_interleave(n)[rows]
            logits = logits + scale * F.linear(normed, self.weight[rows].float())
        return logits.sigmoid().unflatten(-1, (-1, n, 1)).unbind(-3)


class Streams(LoopState):
    """The residual streams of a recursion."""

    def __init__(self, hidden_size: int, num_steps: int, config: HyperConnections) -> None:
        super().__init__()
        self.num_streams = config.streams
        self.mixers = nn.ModuleList(StreamMixer(hidden_size, config) for _ in range(num_steps))

    def begin(self, hidden: Float[Tensor, "*t h"]) -> Float[Tensor, "*t nh"]:
        """The streams of tokens that enter the recursion."""
        return hidden.repeat(*[1] * (hidden.dim() - 1), self.num_streams)

    def end(self, carried: Float[Tensor, "*t nh"]) -> Float[Tensor, "*t h"]:
        """The states that streams stand for."""
        return self._apart(carried).mean(dim=-2)

    def read(self, step: int, carried: Float[Tensor, "*t nh"]) -> Float[Tensor, "*t h"]:
        """What enters the layers of a step."""
        (read,) = self.mixers[step](carried, is_before=True)
        return (read * self._apart(carried)).sum(dim=-2).to(carried.dtype)

    def update(
        self,
        step: int,
        carried: Float[Tensor, "*t nh"],
        output: Float[Tensor, "*t h"],
        origin: Float[Tensor, "*t nh"] | None,
        combine: Combine,
        notes: Float[Tensor, "*t 2n"] | None = None,
    ) -> Float[Tensor, "*t nh"]:
        """The streams after a step, of which the router combines every one."""
        return combine(carried, self.write(step, carried, output, notes), origin)

    def notes(self, step: int, carried: Float[Tensor, "*t nh"]) -> Float[Tensor, "*t 2n"]:
        """`write / 2` and `keep` of each token."""
        parts = self.mixers[step](carried, is_before=False)
        return torch.cat(
            [part.squeeze(-1).expand(*carried.shape[:-1], -1) for part in parts], dim=-1
        )

    def write(
        self,
        step: int,
        wide: Float[Tensor, "*t nh"],
        output: Float[Tensor, "*t h"],
        notes: Float[Tensor, "*t 2n"] | None = None,
    ) -> Float[Tensor, "*t nh"]:
        """The streams after a step, given the output of its layers."""
        if notes is None:
            write, keep = self.mixers[step](wide, is_before=False)
        else:
            write, keep = notes.unflatten(-1, (2, self.num_streams, 1)).unbind(-3)
        new = keep * self._apart(wide) + 2 * write * output[..., None, :]
        return new.flatten(-2).to(wide.dtype)

    def _apart(self, wide: Tensor) -> Float[Tensor, "*t n h"]:
        return wide.unflatten(-1, (self.num_streams, -1))
