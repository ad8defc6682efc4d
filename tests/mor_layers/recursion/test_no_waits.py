"""With fixed capacities a recursion is one region without waits, which a CUDA graph can hold."""

from dataclasses import replace
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from mor_layers import ExpertChoice, FixedDepth, RandomDepth, RouterConfig, TokenChoice
from mor_layers.layers import NormModulation
from mor_layers.recursion import KV_POLICIES
from mor_layers.routers import DampedLoops, registered_routers
from tests.distributed.layers.host_waits import host_waits
from tests.mor_layers.small_models import random_states, small_config, small_model

ROUTERS: dict[str, RouterConfig] = {
    "expert choice": ExpertChoice(z_loss_coefficient=0.01),
    "auxiliary router": ExpertChoice(predictor="aux_router", combine="residual"),
    "fixed depth": FixedDepth(),
    "random depth": RandomDepth(),
    "damped loops": DampedLoops(),
}
_VALUES_TO_HOST = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique",
    "unique",
    "bincount",
)


class RefusesWaits(TorchDispatchMode):
    """Raises where the host would read a value, or where a size would depend on one."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function).removeprefix("aten.")
        assert not name.startswith(_VALUES_TO_HOST), f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


def step_of(router: RouterConfig, policy: Any, recompute: bool = False, **changes: Any) -> None:
    """One forward and backward pass of a recursion in which nothing may wait."""
    config = small_config(router, kv_policy=policy)
    assert config.recursion is not None
    config = replace(config, recursion=replace(config.recursion, **changes))
    (block,) = small_model(config, recompute=recompute).train().recursions
    hidden = random_states(9, 2)
    with host_waits() as found, RefusesWaits():
        output = block(hidden)
        loss = output.hidden.square().mean() + sum(output.losses.values())
        loss.backward()
    assert found == {}
    assert hidden.grad is not None and hidden.grad.any()


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("name", list(ROUTERS))
def test_a_recursion_with_fixed_capacities_never_waits(name: str, policy: Any) -> None:
    step_of(ROUTERS[name], policy)


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute": True},
        {"share_norms": False, "sandwich_norms": True},
        {"step_embeddings": True, "input_injection": True},
        {"norm_modulation": NormModulation()},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_what_else_a_step_has_never_waits(changes: dict[str, Any]) -> None:
    step_of(ROUTERS["expert choice"], "recursive_sharing", **changes)


def test_every_router_that_declares_fixed_capacities_is_here() -> None:
    fixed = set()
    for kind in registered_routers().values():
        if not kind.__module__.startswith("mor_layers."):  # of another test
            continue
        try:
            config = kind()
        except TypeError:  # a router made from another one
            continue
        if config.has_fixed_capacities:
            fixed.add(kind)
    assert fixed == {type(router) for router in ROUTERS.values()}


def test_a_ragged_selection_is_noticed() -> None:
    with pytest.raises(AssertionError, match="waits for the device"):
        step_of(TokenChoice(), "recursion_wise")
