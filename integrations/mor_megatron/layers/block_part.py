"""What a rank has of a recursion block that is spread over the pipeline.

Legend: `k` tokens that run a step, `b` batch, `h` hidden.
"""

from dataclasses import dataclass

from torch import Tensor

from mor_layers import Router, RoutingDecision


@dataclass(frozen=True)
class BlockPart:
    """The layers of a block that are here, and what is done here beside running them."""

    block_size: int
    """Layers of the whole block (K)."""
    first: int = 0
    """Layers of the block on earlier ranks."""
    routes: bool = True
    """Whether every step begins here: tokens are routed, and their states enter the layers."""


class CombiningRouter(Router):
    """Stands for a router that lives on another rank, and combines as that one does.

    Args:
        router: a router with the same settings. It must combine without parameters and buffers,
            and none of it is kept.
    """

    def __init__(self, router: Router) -> None:
        super().__init__(router.num_recursions)
        self.combines_with_origin = router.combines_with_origin  # type: ignore[misc]
        # On the meta device it takes no memory. A bound method, unlike the module, registers
        # nothing, so that no optimizer and no checkpoint finds the router here too.
        self._combine = router.to("meta").combine

    def decide(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
    ) -> RoutingDecision:
        raise AssertionError("tokens are routed on the first rank")

    def combine(
        self,
        step: int,
        selected: Tensor,
        output: Tensor,
        decision: RoutingDecision,
        origin: Tensor | None,
    ) -> Tensor:
        return self._combine(step, selected, output, decision, origin)
