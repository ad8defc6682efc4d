"""What routing did with the global batch: the counts of all data-parallel ranks, as tensors.

Nothing here waits for the device, so that it can be asked for after every batch.
Legend: `r` recursion step, `l` layer of the block, `e` expert.
"""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from mor_megatron.layers.recursion import RecursionLayer


@dataclass(frozen=True)
class GlobalRouting:
    """Of one recursion, since its counts were cleared."""

    shares: Tensor
    """Tokens that ran each step over tokens that entered the recursion, `[r]`."""
    dead_positions: Tensor
    """Share of positions in the sequence whose tokens never ran the last step, a scalar."""
    metrics: dict[str, Tensor]
    """Means over forward passes by `step_<r>/<name>`, scalars."""


@dataclass(frozen=True)
class GlobalExperts:
    """Of the experts of one recursion, since their counts were cleared."""

    load: Tensor
    """Tokens that each expert got, `[r l e]`."""
    drops: Tensor
    """Tokens that each expert turned away, `[r l e]`."""
    balance: Tensor
    """Each cell's term of the balance loss, `[r l e]`."""
    z_loss: Tensor
    """`[r l]`"""


@torch.no_grad()
def global_routing(layer: RecursionLayer) -> GlobalRouting:
    """Add up the counts of all ranks that process other sequences. Call it on every one of them."""
    statistics, group = layer.statistics, data_group()
    counts = tokens_per_step(layer).double()
    positions = statistics.last_step_positions
    positions = counts.new_zeros(1) if positions is None else positions.double()
    names = sorted(statistics.metrics)
    means = [statistics.metrics[n].double() / statistics.metric_counts[n] for n in names]
    metrics = torch.stack(means) if means else counts.new_zeros(0)
    sums = torch.cat([counts, positions, metrics])
    torch.distributed.all_reduce(sums, group=group)
    counts, positions, metrics = sums.split([len(counts), len(positions), len(metrics)])
    return GlobalRouting(
        shares=counts[1:] / counts[0].clamp(min=1),
        dead_positions=(positions == 0).double().mean(),
        metrics=dict(zip(names, metrics / group.size(), strict=True)),
    )


@torch.no_grad()
def global_experts(layer: RecursionLayer) -> GlobalExperts | None:
    """Add up the counts of all ranks' experts; None without a mixture of experts."""
    parts = []
    for router in layer.expert_routers:
        cells = {name: buffer.clone() for name, buffer in router.cells.named_buffers()}
        for value in cells.values():
            torch.distributed.all_reduce(value, group=router.tp_dp_cp_group)
        wanted, tokens = cells["load"] + cells["drops"], cells["tokens"].clamp(min=1)
        share = wanted / wanted.sum(dim=-1, keepdim=True).clamp(min=1)
        mean = cells["scores"] / tokens[:, None]
        balance = wanted.shape[-1] * share * mean
        parts.append((cells["load"], cells["drops"], balance, cells["squares"] / tokens))
    if not parts:
        return None
    return GlobalExperts(*(torch.stack(values, dim=1) for values in zip(*parts, strict=True)))


def tokens_per_step(layer: RecursionLayer) -> Tensor:
    """Tokens of this rank that entered the recursion, followed by those that ran each step,
    `[1 + r]`.
    """
    counts = layer.statistics.tokens_per_step
    if counts is None:
        device = next(layer.parameters()).device
        return torch.zeros(1 + layer.statistics.num_recursions, device=device)
    return counts.clone()


def data_group() -> torch.distributed.ProcessGroup:
    """The ranks that process other sequences of the global batch."""
    return parallel_state.get_data_parallel_group()  # type: ignore[return-value]
