"""More recursion steps than a model was trained with: the dial beyond its end.

    deeper = deepened(model, extra_steps=2)

Cyclic recursion runs one block again and again, so it can run it more often; no weight changes. The
further steps are inserted before the last: they are decided by the rule of the last step, and their
tokens go on as those of the step before it do. What is kept per step (norms, deltas, embeddings,
routers over experts, their biases and thresholds) is the last step's. Whether further steps help is
the model's affair: measure it with the full forward pass, which decides as generation does.

Legend: `b` batch, `n` candidates of a step, `k` tokens selected, `h` hidden.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mor_layers.field_types import check_types
from mor_layers.routers.base import Router, RouterConfig, register_router
from mor_layers.routers.baselines import FixedDepth
from mor_layers.routing import RoutingDecision
from mor_layers.transformer import MoRTransformer


@register_router("deepened")
@dataclass(frozen=True)
class Deepened(RouterConfig):
    """A router with further steps after those it was trained for."""

    router: RouterConfig
    """Settings it was trained with."""
    extra_steps: int
    """Of `num_recursions`, how many it was not trained for. At least 1."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.extra_steps < 1:
            raise ValueError(f"Deepened.extra_steps={self.extra_steps} must be at least 1.")
        if isinstance(self.router, Deepened):
            raise ValueError(
                f"Deepened.router={self.router} is deepened already. Raise its extra_steps instead."
            )

    def validate(self, num_recursions: int) -> None:
        if num_recursions <= self.extra_steps:
            raise ValueError(
                f"Deepened.extra_steps={self.extra_steps} leaves none of num_recursions="
                f"{num_recursions} to have been trained. Use at most {num_recursions - 1}."
            )
        self.router.validate(num_recursions - self.extra_steps)

    @property
    def needs_updates(self) -> bool:
        return self.router.needs_updates

    def capacity_factors_for(self, num_recursions: int) -> tuple[float, ...] | None:
        return self._continued(self.router.capacity_factors_for(num_recursions - self.extra_steps))

    def mean_experts_for(self, num_recursions: int) -> tuple[float, ...] | None:
        return self._continued(self.router.mean_experts_for(num_recursions - self.extra_steps))

    def build(self, hidden_size: int, num_recursions: int) -> "DeepenedRouter":
        trained = self.router.build(hidden_size, num_recursions - self.extra_steps)
        return DeepenedRouter(trained, self.extra_steps)

    def _continued(self, values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return None if values is None else values + values[-1:] * self.extra_steps


class DeepenedRouter(Router):
    """Asks the trained router, and goes on asking it about its last step."""

    def __init__(self, trained: Router, extra_steps: int) -> None:
        super().__init__(trained.num_recursions + extra_steps)
        self.trained = trained
        self.combines_with_origin = trained.combines_with_origin  # type: ignore[misc]

    def logits(self, hidden: Tensor, step: int) -> Tensor | None:
        return self.trained.logits(hidden, self._trained_step(step))

    def decide(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
    ) -> RoutingDecision:
        return self.trained.decide(logits, self._trained_step(step), previous, causal)

    def assess(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        decision: RoutingDecision,
    ) -> RoutingDecision:
        return self.trained.assess(logits, self._trained_step(step), previous, decision)

    def combine(
        self,
        step: int,
        selected: Tensor,
        output: Tensor,
        decision: RoutingDecision,
        origin: Tensor | None,
    ) -> Tensor:
        last = self.trained.num_recursions - 1
        if step == self.num_recursions - 1:
            step = last
        elif step >= last:  # whoever runs it goes on, as at the step before the last
            step = max(0, last - 1)
        return self.trained.combine(step, selected, output, decision, origin)

    def advance(self, tokens_per_step: Tensor) -> None:
        self.trained.advance(tokens_per_step[: self.trained.num_recursions])

    def adjust(self, observations: dict[str, Tensor]) -> None:
        self.trained.adjust(observations)

    def tune(self, shares: tuple[float, ...], observe: Callable[[int], Tensor]) -> None:
        self.trained.tune(shares[: self.trained.num_recursions], observe)

    def _trained_step(self, step: int) -> int:
        return min(step, self.trained.num_recursions - 1)


def deepened(model: MoRTransformer, extra_steps: int) -> MoRTransformer:
    """The model with further recursion steps; it shares its parameters with the one given.

    Args:
        extra_steps: steps beyond those that the model was trained with. At least 1.

    Raises:
        ValueError: the model does not loop as a whole, or no step is added.
    """
    recursion = model.config.recursion
    if recursion is None or not model.config.schedule.is_cyclic:
        raise ValueError(
            "further steps need a recursion with sharing 'cycle' or 'middle_cycle', whose steps "
            "run the whole block."
        )
    if extra_steps < 1:
        raise ValueError(f"extra_steps={extra_steps} must be at least 1.")
    router = recursion.router
    if isinstance(router, Deepened):
        router = replace(router, extra_steps=router.extra_steps + extra_steps)
    elif not isinstance(router, FixedDepth):
        router = Deepened(router, extra_steps)
    steps = recursion.num_recursions + extra_steps
    layers = model.config.num_unrolled_layers + extra_steps * model.config.schedule.block_size
    config = replace(
        model.config,
        num_unrolled_layers=layers,
        recursion=replace(recursion, num_recursions=steps, router=router),
    )
    with torch.device("meta"):
        deeper = MoRTransformer(config)
    trained = {**model.state_dict(keep_vars=True)}
    wraps = isinstance(router, Deepened) and not isinstance(recursion.router, Deepened)
    state = {}
    for name, wanted in deeper.state_dict().items():
        source = name.replace(".router.trained.", ".router.") if wraps else name
        found = trained[_of_last_step(source, trained)]
        if found.shape != wanted.shape:  # a row a step: biases and thresholds over experts
            rest = found[-1:].expand(len(wanted) - len(found), *found.shape[1:])
            found = torch.cat([found, rest])
        state[name] = found
    deeper.load_state_dict(state, assign=True)
    return deeper.train(model.training)


_STEP = re.compile(r"\.(?:weights|deltas|embeddings|gains)\.(\d+)(?=$|\.(?:a|b|magnitude)$)")


def _of_last_step(name: str, trained: dict[str, Tensor]) -> str:
    """The name itself, or that of the last step's tensor where a further step has none."""
    while name not in trained:
        step = _STEP.search(name)
        assert step is not None, f"{name} is not among the trained model's tensors"
        name = f"{name[: step.start(1)]}{int(step[1]) - 1}{name[step.end() :]}"
    return name
