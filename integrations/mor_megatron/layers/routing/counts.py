"""Routing statistics: sums kept while a model runs, and the report made from them."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mor_layers import RecursionOutput, Tokens


@dataclass
class RoutingStatistics:
    """Sums over the forward passes since `clear`, detached and on the model's device."""

    num_recursions: int
    tokens_per_step: Tensor | None = None
    """Tokens that entered the recursion, followed by those that ran each step, `[1 + r]`."""
    last_step_positions: Tensor | None = None
    """How often the token at each position ran the last step, `[s]`."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Sums of the decisions' metrics, by `step_<r>/<name>` (1-based)."""
    metric_counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """The number of forward passes in each of these sums."""
    observations: dict[str, Tensor] = field(default_factory=dict)
    """Sums of the decisions' observations for `Router.adjust`, by name."""
    depths: Tensor | None = None
    """Number of steps of each token in the last forward pass, `[b s]`."""
    is_closed: bool = False
    """Whether routers were already updated from these sums; the next pass then starts new ones."""
    of_training: bool = True
    """Whether the last pass was training rather than evaluation."""

    def begin(self, is_training: bool, forgets_evaluation: bool) -> bool:
        """Prepare for a forward pass, and return whether new sums were started.

        New sums start after an update has closed the old ones. With `forgets_evaluation` they also
        start when training resumes after an evaluation, because routers must not be updated from
        its tokens.
        """
        is_resumed = is_training and not self.of_training
        is_new = self.is_closed or (is_resumed and forgets_evaluation)
        self.of_training = is_training
        if is_new:
            self.clear()
        self.is_closed = False
        return is_new

    def close(self) -> None:
        """Keep the sums for a report; the next pass starts new ones."""
        self.is_closed = True

    @torch.no_grad()
    def record(self, tokens: Tokens, output: RecursionOutput) -> None:
        """Add one forward pass over `tokens`."""
        if self.is_closed:
            self.begin(self.of_training, forgets_evaluation=False)
        decisions = output.decisions
        counts = torch.stack([tokens.count, *(decision.tokens.count for decision in decisions)])
        last = decisions[-1].tokens
        ran = torch.ones_like(last.positions) if last.counted is None else last.counted.long()
        positions = torch.zeros(last.sequence_length, dtype=torch.long, device=ran.device)
        positions = positions.index_add(0, last.positions.flatten(), ran.flatten())
        self.tokens_per_step = _sum(self.tokens_per_step, counts)
        if self.last_step_positions is not None and len(positions) != len(self.last_step_positions):
            self.last_step_positions = None  # the sequence length has changed
        self.last_step_positions = _sum(self.last_step_positions, positions)
        for step, decision in enumerate(decisions, start=1):
            for name, value in decision.metrics.items():
                key = f"step_{step}/{name}"
                self.metrics[key] = _sum(self.metrics.get(key), value)
                self.metric_counts[key] += 1
        for name, value in output.observations.items():
            self.observations[name] = _sum(self.observations.get(name), value)
        self.depths = output.depths.T

    def clear(self) -> None:
        """Reset everything except the depths of the last forward pass."""
        self.tokens_per_step = self.last_step_positions = None
        self.observations.clear()
        self.metrics.clear()
        self.metric_counts.clear()


@dataclass(frozen=True)
class RoutingReport:
    """What one recursion did with the tokens of the global batch."""

    shares: tuple[float, ...]
    """For each step, the fraction of the tokens entering the recursion that ran it."""
    dead_positions: float
    """Fraction of the sequence's positions at which no token ran the last step."""
    metrics: dict[str, float]
    """Means over forward passes by `step_<r>/<name>`: sampling_loss, sampling_accuracy, ..."""
    expert_load: Tensor | None
    """Tokens computed by each expert, `[step layer expert]`; None without a mixture of experts."""
    expert_drops: Tensor | None = None
    """Tokens dropped by each expert because it was full, `[step layer expert]`."""
    expert_balance: Tensor | None = None
    """Each cell's term of the balance loss, `[step layer expert]`. The terms of a step and layer
    sum to its loss, which is 1 if the load is even."""
    expert_z_loss: Tensor | None = None
    """The z-loss of each step and layer, `[step layer]`."""


def _sum(total: Tensor | None, value: Tensor) -> Tensor:
    return value.clone() if total is None else total + value
