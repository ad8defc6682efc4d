"""Relaxed recursion: deltas that each step adds to projections that all steps share.

    lora  y = W x + scale · B_r A_r x
    dora  y = m_r · (W + scale · B_r A_r) x / ‖W + scale · B_r A_r‖, norms and m_r one per row of W

`B_r` starts at 0 and `m_r` at the norms of `W`, where the model equals the unrelaxed one, bit for bit.
The alternative is to start from truncated singular value decompositions of the difference between a
dense model's layers and the shared weights; see `mor_layers.weights.uptraining`.

Sources: Bae et al. 2024 (Relaxed Recursive Transformers, arXiv 2410.20672), section 2.3; Liu et al.
2024 (DoRA, arXiv 2402.09353), whose section 4.3 we follow: the norms get no gradient.

Legend: `b` batch, `k` tokens that run a step, `i` inputs and `o` outputs of a projection, `q` rank.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mor_layers.recursion import KVPolicy, StepContext
from mor_layers.settings import check_types, require_choice

RelaxationKind = Literal["lora", "dora"]
Projection = Literal["query", "key", "value", "output", "gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
MLP_PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")


@dataclass(frozen=True)
class Relaxation:
    """Settings of per-step deltas."""

    rank: int
    """Rank of each delta, capped at the projection's smaller dimension. At least 1."""
    kind: RelaxationKind = "lora"
    """`lora`: a delta is added. `dora`: additionally, each row has its own magnitude."""
    projections: tuple[Projection, ...] = PROJECTIONS
    """Projections with deltas: query, key, value, output (attention), gate, up, down (MLP)."""
    scale: float = 1.0
    """Weight of the deltas. Not 0."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.rank < 1:
            raise ValueError(f"Relaxation.rank={self.rank} must be at least 1.")
        require_choice("Relaxation", "kind", self.kind, get_args(RelaxationKind))
        unknown = [name for name in self.projections if name not in PROJECTIONS]
        if unknown or not self.projections or len(set(self.projections)) < len(self.projections):
            raise ValueError(
                f"Relaxation.projections={self.projections} must name one or more of "
                f"{', '.join(PROJECTIONS)}, each once."
            )
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"Relaxation.scale={self.scale} must be finite, and not 0.")

    def check(self, num_recursions: int, kv_policy: KVPolicy) -> None:
        """Raise ValueError if a delta has no effect or contradicts the KV policy."""
        if num_recursions < 2:
            raise ValueError(
                f"relaxation has no effect with num_recursions={num_recursions}: there is nothing "
                "shared to relax. Leave it out."
            )
        keyed = [name for name in ("key", "value") if name in self.projections]
        if not keyed or kv_policy not in ("exit_state", "recursive_sharing"):
            return
        why = {
            "exit_state": "projects an exited token once for all later steps, which a delta would "
            "make different at each",
            "recursive_sharing": "computes keys and values at the first step only",
        }[kv_policy]
        rest = tuple(name for name in self.projections if name not in keyed)
        raise ValueError(
            f"kv_policy={kv_policy!r} {why}, so Relaxation.projections cannot have "
            f"{' and '.join(keyed)}. Use projections={rest}, or another kv_policy."
        )

    def rank_of(self, into: int, out: int) -> int:
        """Rank of the delta of a projection with `into` inputs and `out` outputs."""
        return min(self.rank, into, out)


def row_norms(
    weight: Float[Tensor, "o i"], a: Float[Tensor, "q i"], b: Float[Tensor, "o q"], scale: float
) -> Float[Tensor, " o"]:
    """Norms of the rows of a relaxed weight, in fp32."""
    return torch.linalg.vector_norm(weight.float() + scale * (b @ a).float(), dim=1)


def norms_over_ranks(own: Float[Tensor, " o"], group: ProcessGroup) -> Float[Tensor, " o"]:
    """Norms of rows whose columns are spread over ranks, from the norms of each rank's part."""
    if group.size() == 1:
        return own
    squares = own.square()
    torch.distributed.all_reduce(squares, group=group)
    return squares.sqrt()


class StepDelta(nn.Module):
    """The delta of one step for one projection, held whole on this rank.

    If ranks hold parts of a weight, they use subclasses for the parts, which override `lowered` and
    `norms`.
    """

    def __init__(self, into: int, out: int, relaxation: Relaxation) -> None:
        super().__init__()
        rank = relaxation.rank_of(into, out)
        self.scale = relaxation.scale
        self.a = nn.Parameter(torch.empty(rank, into))
        self.b = nn.Parameter(torch.zeros(out, rank))
        self.magnitude = nn.Parameter(torch.empty(out)) if relaxation.kind == "dora" else None

    @torch.no_grad()
    def reset(self, weight: Float[Tensor, "o i"]) -> None:
        """Set the initial value, at which the projection is that of `weight`."""
        nn.init.normal_(self.a, std=0.02)
        nn.init.zeros_(self.b)
        if self.magnitude is not None:
            self.magnitude.copy_(row_norms(weight, self.a, self.b, self.scale))

    def forward(
        self,
        hidden: Float[Tensor, "k b i"],
        projected: Float[Tensor, "k b o"],
        weight: Float[Tensor, "o i"],
    ) -> Float[Tensor, "k b o"]:
        """This step's projection of `hidden`, given `projected`, that of the shared weight."""
        relaxed = projected + self.scale * F.linear(self.lowered(hidden), self.b)
        if self.magnitude is None:
            return relaxed
        return relaxed * (self.magnitude / self.norms(weight)).to(relaxed.dtype)

    def lowered(self, hidden: Float[Tensor, "k b i"]) -> Float[Tensor, "k b q"]:
        """`A x`."""
        return F.linear(hidden, self.a)

    @torch.no_grad()
    def norms(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, " o"]:
        """Norms of the rows of the step's own weight."""
        return row_norms(weight, self.a, self.b, self.scale)


def merged_weight(
    weight: Float[Tensor, "o i"],
    a: Float[Tensor, "q i"],
    b: Float[Tensor, "o q"],
    scale: float,
    magnitude: Float[Tensor, " o"] | None = None,
) -> Float[Tensor, "o i"]:
    """The weight of one step's projection, computed in fp32 and cast to the dtype of `weight`."""
    own = weight.float() + scale * (b.float() @ a.float())
    if magnitude is not None:
        own = own * (magnitude.float() / row_norms(weight, a, b, scale))[:, None]
    return own.to(weight.dtype)


class RelaxedLinear(nn.Linear):
    """A projection that all steps share, with a delta for each step."""

    def __init__(
        self, into: int, out: int, bias: bool, relaxation: Relaxation, num_steps: int
    ) -> None:
        super().__init__(into, out, bias=bias)
        self.deltas = nn.ModuleList(StepDelta(into, out, relaxation) for _ in range(num_steps))
        self.reset_deltas()

    def reset_deltas(self) -> None:
        """Set the initial values, at which every step has the shared weight."""
        for delta in self.deltas:
            delta.reset(self.weight)  # type: ignore[operator]

    def forward(self, hidden: Tensor, context: StepContext) -> Tensor:  # type: ignore[override]
        return self.relaxed(hidden, F.linear(hidden, self.weight), context)

    def relaxed(
        self,
        hidden: Float[Tensor, "k b i"],
        projected: Float[Tensor, "k b o"],
        context: StepContext,
    ) -> Float[Tensor, "k b o"]:
        """The projection, given `projected`, the product of `hidden` with the shared weight."""
        relaxed = context.at_each_step(
            len(hidden),
            lambda step, rows: self.deltas[step](hidden[rows], projected[rows], self.weight),
        )
        return relaxed if self.bias is None else relaxed + self.bias
