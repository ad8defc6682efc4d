"""What a step's input is given beside the state: who it is, and where the recursion began.

    embeddings  x <- x + e_r            a learnt vector of each step
    injection   x <- x + g_r ⊙ H_1      from the second step on, the states that entered the recursion

Both start at zero, where the model is the one without them, bit for bit. The residual that a router
combines with stays as it was, and so does the state that an exited token keeps.

Sources: Geiping et al. 2025 (arXiv 2502.05171) for re-injecting the input of a loop; here each of its
numbers has a gain, which costs no matrix product.

Legend: `b` batch, `k` tokens that run a step, `h` hidden, `r` recursion step.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mor_layers.modules import CalledParameters


class StepInput(nn.Module):
    """Adds to the states that enter the layers at a step.

    Args:
        embeds: whether each step has an embedding.
        injects: whether later steps see the states that entered the recursion.
    """

    def __init__(self, hidden_size: int, num_steps: int, embeds: bool, injects: bool) -> None:
        super().__init__()
        self.injects = injects

        def vectors(count: int) -> CalledParameters:
            return CalledParameters(nn.Parameter(torch.zeros(hidden_size)) for _ in range(count))

        self.embeddings = vectors(num_steps if embeds else 0)
        self.gains = vectors(num_steps - 1 if injects else 0)

    def forward(
        self, step: int, hidden: Float[Tensor, "k b h"], origin: Float[Tensor, "k b h"] | None
    ) -> Float[Tensor, "k b h"]:
        """`hidden` as it enters the layers; `origin` is needed where this injects."""
        if len(self.embeddings):
            hidden = hidden + self.embeddings(step).to(hidden.dtype)
        if self.injects and step > 0:
            assert origin is not None
            hidden = hidden + self.gains(step - 1).to(hidden.dtype) * origin
        return hidden
