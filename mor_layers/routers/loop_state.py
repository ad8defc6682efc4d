"""What a token is between steps, where that is more than one hidden state.

Legend: `t` tokens (any leading dimensions), `h` hidden, `w` numbers that a token carries.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

Combine = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""How a router combines the states that entered a step, the step's output, and the states that entered
the recursion (if it wants them) into new states. The states may have any width."""


class LoopState(nn.Module):
    """Several hidden states of a token, in one row of `w` numbers.

    Selecting rows, writing them back, and moving them between ranks and caches need to know nothing of
    what a row consists of.
    """

    def notes(self, step: int, carried: Float[Tensor, "*t w"]) -> Float[Tensor, "*t m"] | None:
        """What `update` computes from parameters, `m` numbers of each token in fp32; None: nothing.

        Where the layers of a step are spread over ranks, the one that holds the parameters sends this
        to the one that updates the states.

        Args:
            carried: what the tokens carried before the step.
        """
        return None

    def begin(self, hidden: Float[Tensor, "*t h"]) -> Float[Tensor, "*t w"]:
        """What tokens that enter the recursion carry."""
        raise NotImplementedError

    def end(self, carried: Float[Tensor, "*t w"]) -> Float[Tensor, "*t h"]:
        """The hidden states that it stands for: what routers score and what leaves the recursion."""
        raise NotImplementedError

    def read(self, step: int, carried: Float[Tensor, "*t w"]) -> Float[Tensor, "*t h"]:
        """What enters the layers of a step."""
        raise NotImplementedError

    def update(
        self,
        step: int,
        carried: Float[Tensor, "*t w"],
        output: Float[Tensor, "*t h"],
        origin: Float[Tensor, "*t w"] | None,
        combine: Combine,
        notes: Float[Tensor, "*t m"] | None = None,
    ) -> Float[Tensor, "*t w"]:
        """What tokens carry after a step.

        Args:
            output: of the step's layers.
            origin: what the tokens carried when they entered the recursion, if the router wants it.
            combine: the router's.
            notes: the result of `notes`, if it was computed elsewhere. With it, no parameters are used.
        """
        raise NotImplementedError
