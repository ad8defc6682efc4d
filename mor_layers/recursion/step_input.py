"""What happens to the input of a step: a norm, a step embedding, and the state before the first step.

    norm        x <- RMSNorm(x)         from the second step on, before the others
    adapter     x <- W [x, H_1]         x is the initial state at the first step, zero or drawn
    embeddings  x <- x + e_r            a learned vector for each step
    injection   x <- x + g_r ⊙ H_1      from the second step on, the states that entered the recursion

Embeddings and gains start at zero, where the model equals the one without them, bit for bit. None of
them changes the residual that a router combines with, or the final state of a token that exits.

Source: Geiping et al. 2025 (arXiv 2502.05171, Huginn) for re-injecting the input of a loop. Theirs is
the adapter, and their state begins as noise; in evaluation ours begins at zero, so that nothing depends
on a draw. Under `injection`, each channel has a gain, which needs no matrix product. Zhu et al. 2025
(arXiv 2510.25741, Ouro) for the norm, which is their model's last one; here it has a weight of its own.

Legend: `b` batch, `k` tokens that run a step, `h` hidden, `r` recursion step.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mor_layers.modules import CalledParameters
from mor_layers.settings import check_types

MOST_DEVIATIONS = 3
"""Initial states are drawn within this many standard deviations."""


@dataclass(frozen=True)
class StateAdapter:
    """Settings of a projection of state and recursion's input together, before every step."""

    initial_std: float = 0.0
    """Standard deviation of the state that the first step begins with in training, 0 or more. In
    evaluation, the state begins at zero."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.initial_std < math.inf:
            raise ValueError(
                f"StateAdapter.initial_std={self.initial_std} must be 0 or more, and finite."
            )


class StepInput(nn.Module):
    """Normalises the states that enter the layers, and adds step embeddings and the injected input.

    Args:
        norm_epsilon: of the norm; None: no norm.
        adapter: projects the state together with what entered the recursion; None: no projection.
        embeds: whether each step has an embedding.
        injects: whether later steps see the states that entered the recursion.
    """

    def __init__(
        self,
        hidden_size: int,
        num_steps: int,
        embeds: bool,
        injects: bool,
        norm_epsilon: float | None = None,
        adapter: StateAdapter | None = None,
    ) -> None:
        super().__init__()
        self.injects, self.norm_epsilon, self.adapter = injects, norm_epsilon, adapter

        def vectors(count: int) -> CalledParameters:
            return CalledParameters(nn.Parameter(torch.zeros(hidden_size)) for _ in range(count))

        self.embeddings = vectors(num_steps if embeds else 0)
        self.gains = vectors(num_steps - 1 if injects else 0)
        is_normed = norm_epsilon is not None
        self.norms = CalledParameters([nn.Parameter(torch.ones(hidden_size))] if is_normed else [])
        self.projections = CalledParameters()
        if adapter is not None:
            weight = torch.empty(hidden_size, 2 * hidden_size)
            self.projections.append(
                nn.Parameter(weight if weight.is_meta else weight.normal_(std=0.02))
            )

    @property
    def needs_origin(self) -> bool:
        """Whether steps see the states that entered the recursion."""
        return self.injects or self.adapter is not None

    def forward(
        self, step: int, hidden: Float[Tensor, "k b h"], origin: Float[Tensor, "k b h"] | None
    ) -> Float[Tensor, "k b h"]:
        """`hidden` as it enters the layers; `origin` is needed if the input is injected."""
        if len(self.norms) and step > 0:
            normed = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=self.norm_epsilon)
            hidden = normed.to(hidden) * self.norms(0).to(hidden.dtype)
        if self.adapter is not None:
            assert origin is not None
            state = hidden if step > 0 else self._initial(hidden, self.adapter.initial_std)
            weight = self.projections(0).to(hidden.dtype)
            hidden = F.linear(torch.cat([state, origin], dim=-1), weight)  # [k b 2h] -> [k b h]
        if len(self.embeddings):
            hidden = hidden + self.embeddings(step).to(hidden.dtype)
        if self.injects and step > 0:
            assert origin is not None
            hidden = hidden + self.gains(step - 1).to(hidden.dtype) * origin
        return hidden

    def _initial(self, like: Float[Tensor, "k b h"], std: float) -> Float[Tensor, "k b h"]:
        state = torch.zeros_like(like)
        if not (self.training and std):
            return state
        return nn.init.trunc_normal_(
            state, std=std, a=-MOST_DEVIATIONS * std, b=MOST_DEVIATIONS * std
        )
