"""History injection with step conditioning: a step sees where the state came from, and when it is.

    x = H_r + Σ_j b_j ⊙ (H_{r-j} - H_r)           what enters the layers of step r, j = 1..min(w, r - 2)
    H_{r+1} = H_r + g_r · (f(x) - H_r)            after the step; f includes its own residual stream
    g_r = 1 + q · ψ(t_r, 1/N), t_r = (r - 1) / N  one number for each step

`H_1` is the state that enters the recursion. The differences are the recent velocity of the state, by
channel (`b_j`) and for a window of `w` earlier states. `b` and `q` start at zero, where the model equals
the plain loop.

Source: What Makes Recurrence Effective in Looped Language Models? (arXiv 2609.36636): more loops than in
training cost knowledge, and injecting the first state prevents it less well than injecting differences
of recent ones. The defaults are its best combination: channel-wise injection with a window of 2, and
loop gating. As there, `H_1` is no history (`input_injection` adds it), and the grid of times is rescaled
to the number of steps, in `deepened` models too. We know the paper from summaries with its formulas,
which do not spell out ψ: ours has sines and cosines of half a turn and one turn, of `t_r` and of `1/N`,
eight numbers as there. Under a router, the gate of the step applies before the router's.

Legend: `t` tokens (any leading dimensions), `h` hidden, `r` steps, numbered from 1, `w` window.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mor_layers.modules import CalledParameters
from mor_layers.routers.loop_state import Combine, LoopState
from mor_layers.settings import check_types

STEP_FEATURES = 8
"""Size of ψ."""


@dataclass(frozen=True)
class HistoryInjection:
    """Settings of history injection."""

    window: int = 2
    """Number of earlier states that a step may see (w). From 1 to the number of steps minus 2."""
    step_gate: bool = True
    """Whether a learned function of the step scales what the step changes."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.window < 1:
            raise ValueError(
                f"HistoryInjection.window={self.window} must be at least 1, or leave history out."
            )

    def check(self, num_recursions: int) -> None:
        """Raise ValueError if no step has that many earlier states."""
        most = num_recursions - 2
        if most < 1:
            raise ValueError(
                f"history needs at least 3 steps, not num_recursions={num_recursions}: the state that "
                "enters the recursion is no history. Leave it out, or use input_injection."
            )
        if self.window > most:
            raise ValueError(
                f"HistoryInjection.window={self.window} must be at most {most}, because the last of "
                f"num_recursions={num_recursions} steps has {most} earlier states."
            )

    def parameters(self, hidden_size: int) -> int:
        """Number of parameters."""
        return self.window * hidden_size + STEP_FEATURES * self.step_gate


class History(LoopState):
    """The state of a token and its `window` earlier ones, the most recent first."""

    def __init__(self, hidden_size: int, num_steps: int, config: HistoryInjection) -> None:
        super().__init__()
        self.window, self.num_steps, self.hidden_size = config.window, num_steps, hidden_size
        self.mixing = CalledParameters(
            nn.Parameter(torch.zeros(hidden_size)) for _ in range(config.window)
        )
        gates = [nn.Parameter(torch.zeros(STEP_FEATURES))] if config.step_gate else []
        self.gate = CalledParameters(gates)

    def begin(self, hidden: Float[Tensor, "*t h"]) -> Float[Tensor, "*t w"]:
        """The state, and `window` places that nothing reads before they are filled."""
        return hidden.repeat(*[1] * (hidden.dim() - 1), 1 + self.window)

    def end(self, carried: Float[Tensor, "*t w"]) -> Float[Tensor, "*t h"]:
        return carried[..., : self.hidden_size]

    def read(self, step: int, carried: Float[Tensor, "*t w"]) -> Float[Tensor, "*t h"]:
        state, *earlier = carried.split(self.hidden_size, dim=-1)
        entering = state
        for place in range(min(self.window, max(step - 1, 0))):
            mixing = self.mixing(place).to(state.dtype)
            entering = entering + mixing * (earlier[place] - state)
        return entering

    def update(
        self,
        step: int,
        carried: Float[Tensor, "*t w"],
        output: Float[Tensor, "*t h"],
        origin: Float[Tensor, "*t w"] | None,
        combine: Combine,
        notes: Float[Tensor, "*t 1"] | None = None,
    ) -> Float[Tensor, "*t w"]:
        state = self.end(carried)
        gate = self._gate(step) if notes is None else notes
        if gate is not None:
            output = state + gate.to(state.dtype) * (output - state)
        new = combine(state, output, None if origin is None else self.end(origin))
        return torch.cat([new, carried[..., : self.window * self.hidden_size]], dim=-1)

    def notes(self, step: int, carried: Float[Tensor, "*t w"]) -> Float[Tensor, "*t 1"] | None:
        """The gate of the step, the same for every token."""
        gate = self._gate(step)
        return None if gate is None else gate.float().expand(*carried.shape[:-1], 1)

    def _gate(self, step: int) -> Float[Tensor, ""] | None:
        if not len(self.gate):
            return None
        weights = self.gate(0)
        return 1 + (weights * self._features(step, weights)).sum()

    def _features(self, step: int, like: Tensor) -> Float[Tensor, " 8"]:
        values = [
            function(turns * math.pi * time)
            for time in (step / self.num_steps, 1 / self.num_steps)
            for turns in (1, 2)
            for function in (math.sin, math.cos)
        ]
        return like.new_tensor(values)
