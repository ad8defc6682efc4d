"""What `--spec` of the script names: settings of recursions, and the specs made of them."""

from collections.abc import Callable
from typing import Any

from mor_layers import ExpertChoice, RecursionConfig, TokenChoice
from mor_megatron import update_routers
from mor_megatron.models.megatron_lm import (
    recursion_builder,
    recursion_hybrid_stack,
    recursion_spec,
)

# A router whose updates change the losses of the batches that follow: capacities go down for four
# batches, and a bias follows the load.
WARMUP = RecursionConfig(3, router=ExpertChoice(warmup_steps=4, alpha=0.5))
LOSS_FREE = RecursionConfig(
    3, router=TokenChoice(balancing="loss_free", balancing_coefficient=0.05)
)

warmup = recursion_builder(WARMUP)
loss_free = recursion_spec(LOSS_FREE)

# The same layers, as attention and MLP by turns.
PATTERN = "*-[*-*-]x3*-"
hybrid = recursion_hybrid_stack(PATTERN, WARMUP)


def warmup_and_a_call(config: Any) -> Any:
    """The first, in a loop that also calls `update_routers` after each batch."""
    block = warmup(config)
    transformer = config.transformer
    transformer.finalize_model_grads_func = _Calling(transformer.finalize_model_grads_func)
    return block


class _Calling:
    updates_routers = True  # as the function that it calls

    def __init__(self, updates: Callable[..., Any]) -> None:
        self.updates = updates

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self.updates(model, *args, **kwargs)
        update_routers(model)
