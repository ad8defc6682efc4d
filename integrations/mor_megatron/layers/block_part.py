"""The part of a recursion block that one rank holds when the block is spread over the pipeline.

Legend: `k` tokens that run a step, `b` batch, `h` hidden.
"""

from dataclasses import dataclass

from torch import Tensor

from mor_layers import Router, RoutingDecision


@dataclass(frozen=True)
class BlockPart:
    """Which layers of the block this rank holds, and whether it also routes."""

    block_size: int
    """Number of layers in the whole block (K)."""
    first: int = 0
    """Number of the block's layers on earlier ranks."""
    routes: bool = True
    """Whether every step starts on this rank: tokens are routed here before the first layer."""


class CombiningRouter(Router):
    """Stand-in for a router on another rank: it combines as that router does, but cannot route.

    Args:
        router: a router with the same settings. Its `combine` must use no parameters or buffers,
            because none of them is kept.
    """

    def __init__(self, router: Router) -> None:
        super().__init__(router.num_recursions)
        self.combines_with_origin = router.combines_with_origin  # type: ignore[misc]
        self.draws = router.draws  # type: ignore[misc]
        # A copy on the meta device takes no memory. Only its bound method is stored: unlike a
        # module, a method is not registered, so neither the optimizer nor a checkpoint finds a
        # second router here.
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
