"""Modulation of norms by step and state: how a shared layer tells the steps apart.

    y = norm(x)                                   the norm before attention or MLP
    v_r = W_2 SiLU(W_1 PE(r))                     of the step, from a fixed sinusoidal encoding
    m = SiLU(v_r + D y)                           of the step and of the token
    y <- y ⊙ (1 + U_γ m) + U_β m

`U` starts at zero, where the model equals the one without modulation, bit for bit. Steps have no tables:
`PE(r)` exists for any step, so a model with modulation runs more steps than it was trained with.

Source: LoopMoE (arXiv 2606.04438), whose IterAdaLN conditions the norms of the shared layers on the
iteration, `v_k = MLP_iter(PE(k))`, and on a projection of the token's state. We know the paper by its
abstract and quotations, so what follows is ours: `D` and `U` have a low rank; every norm has its own and
reads the state that it normalises, which keeps modulation inside a layer, wherever the layer runs;
branches have no gates.

Legend: `t` tokens (any leading dimensions), `h` hidden, `q` rank, `p` features of a step.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mor_layers.settings import check_types

STEP_FEATURES = 16
"""Size of the encoding of a step."""


@dataclass(frozen=True)
class NormModulation:
    """Settings of the modulation of norms."""

    rank: int = 64
    """Size of the signal by which a norm is modulated (q), capped at the hidden size. At least 1."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.rank < 1:
            raise ValueError(f"NormModulation.rank={self.rank} must be at least 1.")

    def rank_of(self, hidden_size: int) -> int:
        """The rank at a hidden size."""
        return min(self.rank, hidden_size)

    def weights(self, hidden_size: int) -> int:
        """Number of weights that one norm multiplies each token by."""
        return 3 * self.rank_of(hidden_size) * hidden_size

    def parameters(self, hidden_size: int) -> int:
        """Number of parameters of one norm's modulation."""
        rank = self.rank_of(hidden_size)
        return self.weights(hidden_size) + rank * STEP_FEATURES + rank * rank


class Modulator(nn.Module):
    """The modulation of one norm, whole on every rank."""

    def __init__(self, hidden_size: int, config: NormModulation) -> None:
        super().__init__()
        rank = config.rank_of(hidden_size)

        def normal(out: int, into: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.empty(out, into).normal_(std=std))

        self.encoder = normal(rank, STEP_FEATURES, STEP_FEATURES**-0.5)
        self.mixer = normal(rank, rank, rank**-0.5)
        self.down = normal(rank, hidden_size, 0.02)
        self.up = nn.Parameter(torch.zeros(2 * hidden_size, rank))

    def forward(
        self, normed: Float[Tensor, "*t h"], step: int | Int[Tensor, "*t"]
    ) -> Float[Tensor, "*t h"]:
        """The modulated output of a norm.

        Args:
            normed: the output of the norm.
            step: 0-based step of all tokens or, in generation, of each.
        """
        signal = F.silu(self._of_step(step) + F.linear(normed, self.down))
        scale, shift = F.linear(signal, self.up).chunk(2, dim=-1)
        return normed * (1 + scale) + shift

    def _of_step(self, step: int | Tensor) -> Float[Tensor, "*t q"]:
        if isinstance(step, Tensor):
            features = encoded(step).to(self.encoder.dtype)
            return F.linear(F.silu(F.linear(features, self.encoder)), self.mixer)
        # A product of a matrix and a vector, which waits for no device and costs next to nothing.
        features = encoded(torch.full((), step, device=self.encoder.device)).to(self.encoder)
        return torch.mv(self.mixer, F.silu(torch.mv(self.encoder, features)))


def encoded(step: Int[Tensor, "*t"]) -> Float[Tensor, "*t p"]:
    """Encoding of steps, in fp32: sines, then cosines, of wavelengths from 2π to 200π."""
    count = STEP_FEATURES // 2
    exponents = torch.arange(count, device=step.device) / (count - 1)
    angles = step[..., None].float() * torch.exp(-math.log(100.0) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
