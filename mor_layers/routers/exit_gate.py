"""The exit gate of Ouro: after every step, a gate on the state says how likely the token stops there.

Source: Zhu et al. 2025 (arXiv 2510.25741). With `λ_r = σ(w · norm(H_r) + b)`, the probability of
having exited after step r is `1 - Π (1 - λ_i)` over the steps up to r. In evaluation a token exits
after the first step at which it reaches a threshold. Unlike in the published code, which computes
all steps and then picks one, a token that exits does not run later steps, and what it stores there
depends on the KV policy.

The gate comes with a model that was trained with it. Training here runs all steps and does not change
it.

Legend: `b` batch, `n` candidates of a step, `h` hidden.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mor_layers.routers.base import Router, RouterConfig
from mor_layers.routers.declarations import StepNotes
from mor_layers.routers.registry import register_router
from mor_layers.selection import RoutingDecision
from mor_layers.settings import check_types


@register_router("exit_gate")
@dataclass(frozen=True)
class ExitGate(RouterConfig):
    """Settings of exits by a gate that was trained elsewhere."""

    threshold: float = 1.0
    """A token exits once the probability of having exited reaches this. In (0, 1]; 1: no token exits."""
    epsilon: float = 1e-6
    """Added to the mean square of the state before taking the root. Above 0."""

    def __post_init__(self) -> None:
        check_types(self)
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
        # Buffers, because nothing here trains them.
        self.register_buffer("norm", torch.ones(hidden_size))
        self.register_buffer("weight", torch.zeros(hidden_size))
        self.register_buffer("bias", torch.zeros(1))

    def logits(self, hidden: Tensor, step: int) -> Tensor | None:
        if step == 0 or self.training or not self.config.lets_tokens_exit:
            return None
        # The state that enters step r is the result of r steps.
        normed = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=self.config.epsilon)
        return ((normed * self.norm) @ self.weight + self.bias)[..., None]

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
