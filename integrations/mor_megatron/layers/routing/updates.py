"""What routers change after each batch, by a call or by themselves.

Capacity warm-up, the loss-free bias over depth and thresholds follow what the global batch showed.
Megatron calls `config.finalize_model_grads_func` once a batch, after all microbatches and before the
optimizer's step, in every schedule, and keeps a function that is there already: a place for updates
without a line in the training loop.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from mor_megatron.layers.recursion import RecursionLayer


def recursion_layers(model: nn.Module | Iterable[nn.Module]) -> Iterator[RecursionLayer]:
    """The RecursionLayers of a model or of its chunks, in order."""
    for chunk in [model] if isinstance(model, nn.Module) else model:
        yield from (m for m in chunk.modules() if isinstance(m, RecursionLayer))


def update_routers(model: nn.Module | Iterable[nn.Module]) -> None:
    """Let routers change their state: capacity warm-up, loss-free bias over depth, thresholds.

    (The loss-free bias over experts is updated by `finalize_model_grads`.)

    Call it on every rank once after each optimizer step, outside recomputation, and before
    `routing_reports`, which forgets the counts. Counts are those of the global batch, so replicas
    stay alike. It does nothing for a batch after which `update_routers_automatically` did it.
    """
    for layer in recursion_layers(model):
        if not layer.statistics.is_closed:
            _update(layer)


def update_routers_automatically(config: TransformerConfig) -> None:
    """Let Megatron's schedules call `update_routers` after each batch that they train on.

    `config.finalize_model_grads_func` becomes what it was, or Megatron's own, followed by the
    updates. Call it before training, and after anything else that sets this function; a second
    call changes nothing. `routing_reports` then reports on the last batch, not on all since the
    report before, and evaluation does not count. A batch whose step the optimizer skips (fp16 with
    dynamic loss scaling) counts.

    Args:
        config: the one that the model is built with.
    """
    earlier = config.finalize_model_grads_func
    if isinstance(earlier, _UpdatesAfterBatch):
        return
    if earlier is None:
        from megatron.core.distributed import finalize_model_grads

        earlier = finalize_model_grads
    config.finalize_model_grads_func = _UpdatesAfterBatch(earlier)


class _UpdatesAfterBatch:
    """What the schedule calls: the function that was there, then the updates."""

    updates_routers = True
    """What RecursionLayer asks for, to leave evaluation out of the counts."""

    def __init__(self, earlier: Callable[..., Any]) -> None:
        self.earlier = earlier

    def __call__(self, model: list[nn.Module], *args: Any, **kwargs: Any) -> None:
        self.earlier(model, *args, **kwargs)
        for layer in recursion_layers(model):
            _update(layer)
            layer.statistics.close()


@torch.no_grad()
def _update(layer: RecursionLayer) -> None:
    counts = tokens_per_step(layer)
    torch.distributed.all_reduce(counts, group=data_group())
    layer.recursion.router.advance(counts[1:])
    observations = dict(layer.statistics.observations)
    layer.statistics.observations.clear()
    for value in observations.values():
        torch.distributed.all_reduce(value, group=data_group())
    layer.recursion.router.adjust(observations)
    for router in layer.expert_routers:
        router.advance()


def tokens_per_step(layer: RecursionLayer) -> Tensor:
    """Tokens of this rank that entered the recursion, then those that ran each step, `[1 + r]`."""
    counts = layer.statistics.tokens_per_step
    if counts is None:
        device = next(layer.parameters()).device
        return torch.zeros(1 + layer.statistics.num_recursions, device=device)
    return counts.clone()


def data_group() -> torch.distributed.ProcessGroup:
    """The ranks that see other sequences of the global batch."""
    return parallel_state.get_data_parallel_group()  # type: ignore[return-value]
