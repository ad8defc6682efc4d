"""The part of a recursion block that one rank holds when the block is spread over the pipeline.

Legend: `k` tokens that run a step, `b` batch, `h` hidden, `t` tokens (any leading dimensions).
"""

from dataclasses import dataclass

from torch import Tensor

from mor_layers import Router, RoutingDecision
from mor_layers.routers import LoopState
from mor_layers.routers.loop_state import Combine


@dataclass(frozen=True)
class BlockPart:
    """Which layers of the block this rank holds, and whether it also routes."""

    block_size: int
    """Number of layers in the whole block (K)."""
    first: int = 0
    """Number of the block's layers on earlier ranks."""
    routes: bool = True
    """Whether every step starts on this rank: tokens are routed here before the first layer."""


class UpdatingLoopState(LoopState):
    """Stand-in for a loop state whose parameters are on another rank, which sends its notes.

    Args:
        state: a loop state with the same settings, none of whose parameters is kept. Its `begin`, `end`,
            and `update` with notes must use none.
    """

    def __init__(self, state: LoopState) -> None:
        super().__init__()
        # On the meta device, and in a tuple, so that it takes no memory and is not registered: neither
        # the optimizer nor a checkpoint finds its parameters a second time.
        self._state = (state.to("meta"),)

    def begin(self, hidden: Tensor) -> Tensor:
        return self._state[0].begin(hidden)

    def end(self, carried: Tensor) -> Tensor:
        return self._state[0].end(carried)

    def read(self, step: int, carried: Tensor) -> Tensor:
        raise AssertionError("steps are entered on the first rank")

    def update(
        self,
        step: int,
        carried: Tensor,
        output: Tensor,
        origin: Tensor | None,
        combine: Combine,
        notes: Tensor | None = None,
    ) -> Tensor:
        return self._state[0].update(step, carried, output, origin, combine, notes)


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
        if router.loop_state is not None:
            self.loop_state = UpdatingLoopState(router.loop_state)
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
