"""StaticRouting: the router's decisions about rows whose steps are values, without a size that depends
on them.

Every step's rule decides about all rows, and the decision of a row's own step counts. Rules read little,
so this costs less than finding out who is where; a compiler merges what steps have in common. This works
for any router, because in generation a decision depends only on its own token.

Legend: `t` rows, `w` numbers that a token carries between steps, `p` numbers of a router's plan.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor_layers.generation.model_state import ModelState
from mor_layers.generation.tick.graph.rows import StaticRows
from mor_layers.recursion import RecursionBlock
from mor_layers.selection import RoutingDecision, Tokens


class StaticRouting:
    """The rules of a block's router in graphs.

    Args:
        block: the recursion.
        like: a state that enters the recursion, `[1 h]`, for its size, precision and device.
        max_length: largest length of a text.
    """

    def __init__(self, block: RecursionBlock, like: Float[Tensor, "1 h"], max_length: int) -> None:
        self.block, self.max_length = block, max_length
        self.num_steps = block.router.num_recursions
        self._like = like
        self._note()

    def refresh(self) -> bool:
        """Look whether the router has changed; if so, graphs must be compiled anew.

        Routers read thresholds from the device when these have changed, which a graph cannot do. This
        does it before.
        """
        if self.block.router is self._router and not self._state.has_changed():
            return False
        self._note()
        return True

    def _note(self) -> None:
        """Find out what the router notes about tokens."""
        self._router = self.block.router
        self._state = ModelState(self._router)
        self.plan_sizes: list[int] = []
        """Numbers in the plan of tokens that run each step."""
        self.has_gates: list[bool] = []
        """Whether the router has gates at each step."""
        self.may_exit: list[bool] = []
        """Whether a token may exit instead of running each step."""
        self.plan_dtype = self.gate_dtype = torch.float32
        self.states = self.block.begin(self._like)
        """A state between steps, `[1 w]`, of which only the form is of interest."""
        position = torch.zeros(1, 1, dtype=torch.long, device=self.states.device)
        known = RoutingDecision(Tokens(position, self.max_length))
        for step in range(self.num_steps):
            decision = self.block.route(self.states[None], step, known, True, assess=False)
            plan, gates = decision.plan, decision.gates
            self.plan_sizes.append(0 if plan is None else plan.shape[-1])
            self.has_gates.append(gates is not None)
            self.may_exit.append(decision.tokens.is_padding is not None)
            self.plan_dtype = self.plan_dtype if plan is None else plan.dtype
            self.gate_dtype = self.gate_dtype if gates is None else gates.dtype
            known = RoutingDecision(known.tokens, plan=plan)
        self.widest = max(self.plan_sizes)
        """Columns of all plans."""

    def widened(self, plan: Float[Tensor, "t q"]) -> Float[Tensor, "t p"]:
        """A step's plan in as many columns as the longest one has."""
        return F.pad(plan.to(self.plan_dtype), (0, self.widest - plan.shape[-1]))

    def decide(
        self,
        step: int,
        states: Float[Tensor, "t w"],
        positions: Int[Tensor, " t"],
        plan: Float[Tensor, "t p"],
    ) -> tuple[Bool[Tensor, " t"], Float[Tensor, "t p"], Float[Tensor, " t"]]:
        """Decide about rows as if all of them had come to a step.

        Returns:
            Which rows run it, their plans, and their gates (1 where the router has none).
        """
        own = plan[None, :, : self.plan_sizes[step - 1]] if step else plan[None, :, :0]
        known = RoutingDecision(
            Tokens(positions[None], self.max_length), plan=own if own.shape[-1] else None
        )
        decision = self.block.route(states[None], step, known, True, assess=False)
        runs = torch.ones_like(positions, dtype=torch.bool)
        if decision.tokens.is_padding is not None:
            runs = decision.tokens.is_padding[0].logical_not()
        gates = torch.ones_like(positions, dtype=self.gate_dtype)
        return (
            runs,
            plan if decision.plan is None else self.widened(decision.plan[0]),
            gates if decision.gates is None else decision.gates[0],
        )

    def combine(
        self, step: int, rows: StaticRows, output: Float[Tensor, "t h"]
    ) -> Float[Tensor, "t w"]:
        """The new states of rows, given the output of their layers, as if all had run a step."""
        decision = RoutingDecision(
            Tokens(rows.positions[None], self.max_length),
            plan=rows.plan[None, :, : self.plan_sizes[step]] if self.plan_sizes[step] else None,
            gates=rows.gates[None] if self.has_gates[step] else None,
        )
        origin = None if rows.origin_or_none is None else rows.origin[None]
        return self.block.combine(step, rows.hidden[None], output[None], decision, origin)[0]
