"""The exit gate of Ouro: after every step, a gate on the state says how likely the token stops there.

Source: Zhu et al. 2025 (arXiv 2510.25741). With `λ_r = σ(w · norm(H_r) + b)`, the probability of
having exited after step r is `1 - Π (1 - λ_i)` over the steps up to r. In evaluation a token exits
after the first step at which it reaches a threshold. Unlike in the published code, which computes
all steps and then picks one, a token that exits does not run later steps, and what it stores there
depends on the KV policy.

The gate comes with a model that was trained with it, or an oracle teaches it: with `teaching`, and a
loss after every loop (`mor_layers.recursion.loop_loss`), which reads all states out anyway, the gate
learns to stop at the first step whose read-out is right, and to go on before (RecurTrace, arXiv
2609.03379). Where no step is right, it learns to go on. States are detached, so that the gate changes
nothing in the model. Training runs all steps.

Legend: `b` batch, `n` candidates of a step, `s` sequence, `h` hidden, `r` steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mor_layers.routers.base import Router, RouterConfig
from mor_layers.routers.declarations import StepNotes
from mor_layers.routers.registry import register_router
from mor_layers.selection import RoutingDecision
from mor_layers.settings import check_types, require_not_negative


@register_router("exit_gate")
@dataclass(frozen=True)
class ExitGate(RouterConfig):
    """Settings of exits by a gate."""

    threshold: float = 1.0
    """A token exits once the probability of having exited reaches this. In (0, 1]; 1: no token exits."""
    epsilon: float = 1e-6
    """Added to the mean square of the state before taking the root. Above 0."""
    teaching: float = 0.0
    """Weight of the loss by which an oracle teaches the gate. 0: the gate was trained elsewhere."""

    def __post_init__(self) -> None:
        check_types(self)
        require_not_negative("ExitGate", teaching=self.teaching)
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"ExitGate.threshold={self.threshold} must lie in (0, 1]; 1 for no exits."
            )
        if not 0 < self.epsilon < 1:
            raise ValueError(f"ExitGate.epsilon={self.epsilon} must lie in (0, 1).")

    def capacity_factors_for(self, num_recursions: int) -> tuple[float, ...]:
        """Those of training, in which all tokens run all steps."""
        return (1.0,) * num_recursions

    @property
    def learns_exits(self) -> bool:
        return self.teaching > 0

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def lets_tokens_exit(self) -> bool:
        return self.threshold < 1

    def notes_for(self, num_recursions: int) -> tuple[StepNotes, ...]:
        return (StepNotes(plan_size=int(self.lets_tokens_exit)),) * num_recursions

    def build(self, hidden_size: int, num_recursions: int) -> "ExitGateRouter":
        return ExitGateRouter(self, hidden_size, num_recursions)


class ExitGateRouter(Router):
    """Lets tokens exit in evaluation. `plan` is the logarithm of the probability of going on so far."""

    norm: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, config: ExitGate, hidden_size: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.config = config
        first = {
            "norm": torch.ones(hidden_size),
            "weight": torch.zeros(hidden_size),
            "bias": torch.zeros(1),
        }
        for name, value in first.items():
            if config.learns_exits:
                self.register_parameter(name, nn.Parameter(value))
            else:  # nothing trains them
                self.register_buffer(name, value)

    def logits(self, hidden: Tensor, step: int) -> Tensor | None:
        if step == 0 or self.training or not self.config.lets_tokens_exit:
            return None
        # The state that enters step r is the result of r steps.
        return self._gate(hidden)[..., None]

    def teach(
        self,
        states: Sequence[Float[Tensor, "s b h"]],
        is_right: Bool[Tensor, "r s b"],
        is_counted: Bool[Tensor, "s b"],
        gather: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> dict[str, Tensor]:
        going_on = is_counted
        losses, count = [], torch.zeros((), device=is_right.device)
        for state, right in zip(
            states[:-1], is_right, strict=False
        ):  # nothing stops after the last
            loss = F.binary_cross_entropy_with_logits(
                gather(self._gate(state.detach())), right.float(), reduction="none"
            )
            losses.append(torch.where(going_on, loss, torch.zeros_like(loss)).sum())
            count = count + going_on.sum()
            going_on = going_on & ~right
        mean = torch.stack(losses).sum() / count.clamp(min=1)
        return {"exit_gate": self.config.teaching * mean}

    def _gate(self, hidden: Float[Tensor, "*t h"]) -> Float[Tensor, "*t"]:
        normed = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=self.config.epsilon)
        return (normed * self.norm) @ self.weight + self.bias

    def decide(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
    ) -> RoutingDecision:
        if not self.config.lets_tokens_exit:
            return previous.keep_valid()
        if step == 0:
            start = torch.zeros_like(previous.tokens.positions, dtype=torch.float32)
            return previous.with_plan(start[..., None]).keep_valid()
        if logits is None:
            return previous.keep_valid()
        assert previous.plan is not None
        going_on = previous.plan + F.logsigmoid(-logits)  # log Π (1 - λ)
        has_exited = -torch.expm1(going_on[..., 0]) >= self.config.threshold
        return previous.with_plan(going_on).keep_where(has_exited.logical_not())
