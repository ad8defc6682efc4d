"""What a configuration costs, counted from its settings alone (`mor_layers.costs`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mor_layers.costs import account
from mor_layers.routers.capacity import default_capacity_factors
from mor_layers.selection import capacity
from mor_tools.planner import Workload
from mor_tools.pretraining.models.decoder import routed_shares
from mor_tools.pretraining.models.workload import workload
from mor_tools.pretraining.settings import Settings


@dataclass(frozen=True)
class Costs:
    """The cost of the runs of one configuration.

    Raises:
        ValueError: the cost of the settings cannot be counted, because a teacher runs along.
    """

    settings: Settings

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model, each shared weight once."""
        return int(self._work.cost.parameters.total)

    @cached_property
    def embeddings(self) -> int:
        """Parameters of the embedding and the output matrix."""
        parts = self._work.cost.parameters
        return int(parts.embedding + parts.output)

    @cached_property
    def kv_bytes(self) -> float:
        """Bytes that the key-value cache stores for a token, averaged over a sequence, in bf16."""
        return self._work.cost.kv_bytes() / self.settings.data.sequence_length

    @cached_property
    def flops_per_token(self) -> float:
        """Training FLOPs per token once the router's warm-up is over.

        For a router whose settings do not determine how many tokens run each step, equally many exit
        at each step, which is the target of its balancing.
        """
        return self._work.cost.flops_per_token()

    @cached_property
    def forward_flops_per_token(self) -> float:
        """The same of the forward pass alone."""
        return self._work.cost.flops_per_token(training=False)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.settings.training.global_batch_size * self.settings.data.sequence_length

    def reported(self, shares: Sequence[float]) -> Sequence[float] | None:
        """The shares of a run's report as `flops_with` takes them.

        Where layers route by themselves, the report has means over them and the anchors, which say less
        than the settings.
        """
        return None if self.settings.routes_by_layer else shares

    def flops_with(self, shares: Sequence[float] | None) -> float:
        """Training FLOPs per token where `shares` of the tokens run each step of one recursion after
        another."""
        length = self.settings.data.sequence_length
        tokens = None
        if shares is not None:
            routed = routed_shares(self.settings, shares)
            tokens = self._work.shape.tokens_per_step(routed, length)
        if tokens is None:
            return self.flops_per_token
        return account(self._work.shape, length, tokens).flops_per_token()

    def flops(self, steps: int) -> float:
        """Training FLOPs of a run of this many optimizer steps, the router's warm-up included."""
        warm = min(steps, self._warmup_steps)
        return (
            self._warmup_flops(warm) + (steps - warm) * self.flops_per_token * self.tokens_per_step
        )

    def steps_for(self, flops: float) -> int:
        """The number of optimizer steps, at least 1, whose FLOPs are nearest to `flops`."""
        per_step = self.flops_per_token * self.tokens_per_step
        # Steps of the warm-up cost more than later ones, so this many are never too few.
        most = max(1, round(flops / per_step))
        least = max(1, most - self._warmup_steps)
        if self._warmup_flops(self._warmup_steps) <= flops:
            beyond = (flops - self._warmup_flops(self._warmup_steps)) / per_step
            return max(1, self._warmup_steps + round(beyond))
        return min(range(least, most + 1), key=lambda steps: abs(self.flops(steps) - flops))

    @cached_property
    def _work(self) -> Workload:
        return workload(self.settings)

    @property
    def _warmup_steps(self) -> int:
        """Steps in which a router still lets more tokens through than its settings plan."""
        routers = [recursion.router for recursion in self.settings.recursions]
        return max((getattr(router, "warmup_steps", 0) for router in routers), default=0)

    def _warmup_flops(self, steps: int) -> float:
        return sum(
            self.flops_with(self._planned_shares(step)) * self.tokens_per_step
            for step in range(steps)
        )

    def _planned_shares(self, step: int) -> list[float]:
        """The planned shares of an optimizer step, as `flops_with` takes them."""
        length, shares = self.settings.data.sequence_length, list[float]()
        for recursion in self.settings.recursions:
            number, router = recursion.num_recursions, recursion.router
            planned = router.capacity_factors_at(number, step) or default_capacity_factors(number)
            multiple = router.rounds_capacities_to
            shares += [capacity(share, length, multiple) / length for share in planned]
        return shares
