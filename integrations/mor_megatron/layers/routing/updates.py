"""Updates of the routers after each batch, by an explicit call or automatically.

Capacity warm-up, the loss-free bias over depth and the thresholds depend on the tokens of the
global batch. In every schedule, Megatron calls `config.finalize_model_grads_func` once per batch,
after all microbatches and before the optimizer step, and it keeps a function that is already set.
Updates can therefore run there without a change to the training loop.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import nn

from mor_megatron.layers.recursion import RecursionLayer
from mor_megatron.layers.routing.global_batch import data_group, tokens_per_step


def recursion_layers(model: nn.Module | Iterable[nn.Module]) -> Iterator[RecursionLayer]:
    """Yield the RecursionLayers of a model, or of its chunks, in order."""
    for chunk in [model] if isinstance(model, nn.Module) else model:
        yield from (m for m in chunk.modules() if isinstance(m, RecursionLayer))


def update_routers(model: nn.Module | Iterable[nn.Module]) -> None:
    """Update the routers' state: capacity warm-up, loss-free bias over depth, thresholds.

    (The loss-free bias over experts is updated by `finalize_model_grads`.)

    Call it on every rank once after each optimizer step, outside recomputation, and before
    `routing_reports`, which resets the statistics. The counts are summed over the global batch, so
    that replicas stay identical. It does nothing for a batch that `update_routers_automatically`
    has handled.
    """
    for layer in recursion_layers(model):
        if not layer.statistics.is_closed:
            _update(layer)


def update_routers_automatically(config: TransformerConfig) -> None:
    """Let Megatron's schedules call `update_routers` after each training batch.

    `config.finalize_model_grads_func` is replaced by a function that calls the previous one (or
    Megatron's default) and then updates the routers. Call it before training, and after any other
    code that sets this function; a second call changes nothing. `routing_reports` then covers the
    last batch instead of all batches since the previous report, and evaluation is not counted. A
    batch whose optimizer step is skipped (fp16 with dynamic loss scaling) still counts.

    Args:
        config: the configuration that the model is built with.
    """
    earlier = config.finalize_model_grads_func
    if isinstance(earlier, _UpdatesAfterBatch):
        return
    if earlier is None:
        from megatron.core.distributed import finalize_model_grads

        earlier = finalize_model_grads
    config.finalize_model_grads_func = _UpdatesAfterBatch(earlier)


class _UpdatesAfterBatch:
    """Calls the function that was configured before, then updates the routers."""

    updates_routers = True
    """Read by RecursionLayer, to exclude evaluation from the statistics."""

    def __init__(self, earlier: Callable[..., Any]) -> None:
        self.earlier = earlier
        self.listeners: list[Callable[[list[nn.Module]], None]] = []
        """Called last, while the counts of the batch are still there."""

    def __call__(self, model: list[nn.Module], *args: Any, **kwargs: Any) -> None:
        self.earlier(model, *args, **kwargs)
        for layer in recursion_layers(model):
            _update(layer)
            layer.statistics.close()
        for listener in self.listeners:
            listener(model)


@torch.no_grad()
def _update(layer: RecursionLayer) -> None:
    if layer.is_graphed:  # its statistics are not kept, and its router needs none
        return
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
