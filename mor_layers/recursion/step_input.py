"""What happens to the input of a step: a norm, a step embedding, and the state before the first step.

    norm        x <- RMSNorm(x)         from the second step on, before the others
    embeddings  x <- x + e_r            a learned vector for each step
    injection   x <- x + g_r ⊙ H_1      from the second step on, the states that entered the recursion

Embeddings and gains start at zero, where the model equals the one without them, bit for bit. None of
them changes the residual that a router combines with, or the final state of a token that exits.

Source: Geiping et al. 2025 (arXiv 2502.05171) for re-injecting the input of a loop. Here each
channel has a gain, which needs no matrix product. Zhu et al. 2025 (arXiv 2510.25741, Ouro) for the
norm, which is their model's last one; here it has a weight of its own.

Legend: `b` batch, `k` tokens that run a step, `h` hidden, `r` recursion step.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mor_layers.modules import CalledParameters


class StepInput(nn.Module):
    """Normalises the states that enter the layers, and adds step embeddings and the injected input.

    Args:
        norm_epsilon: of the norm; None: no norm.
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
    ) -> None:
        super().__init__()
        self.injects, self.norm_epsilon = injects, norm_epsilon

        def vectors(count: int) -> CalledParameters:
            return CalledParameters(nn.Parameter(torch.zeros(hidden_size)) for _ in range(count))

        self.embeddings = vectors(num_steps if embeds else 0)
        self.gains = vectors(num_steps - 1 if injects else 0)
        is_normed = norm_epsilon is not None
        self.norms = CalledParameters([nn.Parameter(torch.ones(hidden_size))] if is_normed else [])

    def forward(
        self, step: int, hidden: Float[Tensor, "k b h"], origin: Float[Tensor, "k b h"] | None
    ) -> Float[Tensor, "k b h"]:
        """`hidden` as it enters the layers; `origin` is needed if the input is injected."""
        if len(self.norms) and step > 0:
            normed = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=self.norm_epsilon)
            hidden = normed.to(hidden) * self.norms(0).to(hidden.dtype)
        if len(self.embeddings):
            hidden = hidden + self.embeddings(step).to(hidden.dtype)
        if self.injects and step > 0:
            assert origin is not None
            hidden = hidden + self.gains(step - 1).to(hidden.dtype) * origin
        return hidden
