"""Placement of hidden states on tensor-parallel ranks (sequence parallelism).

Each rank holds an equal, contiguous part of a step's rows, which are padded to a multiple of the
group size. Ranks all-gather only the logits, a few numbers per token, and make the same decision for
the full sequence. The selected tokens are then redistributed evenly, so that all ranks have the same
amount of work. Each step communicates one reduce-scatter and one all-gather of the selected rows. Only
logits are communicated for the full sequence.

Legend: `b` batch, `n` candidates of a step, `k` tokens selected, `h` hidden, `c` logits per token,
`shard` rows on this rank.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from mor_layers import RoutingDecision, Tokens
from mor_layers.selection import put_rows, take_rows


def padded(count: int, group: ProcessGroup) -> int:
    """`count`, rounded up to a multiple of the group size."""
    return -(-count // group.size()) * group.size()


def shard_of(rows: Tensor, group: ProcessGroup, fill: float | bool = 0) -> Tensor:
    """This rank's part of replicated rows: `[k b ...] -> [padded(k) / size, b ...]`."""
    extra = padded(len(rows), group) - len(rows)
    if extra:
        rows = torch.cat([rows, rows.new_full((extra, *rows.shape[1:]), fill)])
    return rows.chunk(group.size())[group.rank()]


def shard_of_padding(tokens: Tokens, group: ProcessGroup) -> Tensor | None:
    """True for this rank's rows without a token, including those that pad the shards: `[shard b]`."""
    is_padding = tokens.is_padding
    if is_padding is None:
        if len(tokens.positions) % group.size() == 0:
            return None
        is_padding = torch.zeros_like(tokens.positions, dtype=torch.bool)
    return shard_of(is_padding, group, fill=True)


class SequenceParallelPlacement:
    """A `mor_layers.Placement` over the ranks of a tensor-parallel group."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def gather(self, logits: Tensor, count: int) -> Tensor:
        # All ranks compute the same values from the gathered logits, so each rank already has the
        # complete gradient of every row. The backward pass must split it and not sum it.
        gathered = gather_from_sequence_parallel_region(
            logits, tensor_parallel_output_grad=False, group=self.group
        )
        return gathered[:count]

    def select(self, candidates: Tensor, decision: RoutingDecision) -> Tensor:
        if decision.rows is None:
            return candidates
        local = self._local_rows(decision.rows, len(candidates))
        taken = take_rows(_with_another_row(candidates), local)
        extra = padded(len(taken), self.group) - len(taken)
        taken = F.pad(taken, (0, 0, 0, 0, 0, extra))
        return reduce_scatter_to_sequence_parallel_region(taken, group=self.group)

    def shard(self, decision: RoutingDecision) -> RoutingDecision:
        local = Tokens(
            shard_of(decision.tokens.positions, self.group),
            decision.tokens.sequence_length,
            is_padding=shard_of_padding(decision.tokens, self.group),
        )
        return replace(
            decision,
            tokens=local,
            gates=self._enter(decision.gates),
            plan=self._enter(decision.plan),
        )

    def write_back(self, candidates: Tensor, updated: Tensor, decision: RoutingDecision) -> Tensor:
        if decision.rows is None:
            return updated
        # Afterwards each rank uses different rows, so the backward pass must sum the gradients of a
        # row over the ranks.
        updated = gather_from_sequence_parallel_region(
            updated, tensor_parallel_output_grad=True, group=self.group
        )[: len(decision.rows)]
        local = self._local_rows(decision.rows, len(candidates))
        return put_rows(_with_another_row(candidates), updated, local)[:-1]

    def _local_rows(self, rows: Tensor, count: int) -> Tensor:
        """The local index of global rows among this rank's `count` rows; `count` if another rank has
        them.
        """
        local = rows - self.group.rank() * count
        return torch.where((local >= 0) & (local < count), local, count)

    def _enter(self, values: Tensor | None) -> Tensor | None:
        # Each rank uses only its part of a replicated tensor, so the gradient is summed over ranks.
        if values is None:
            return None
        return shard_of(copy_to_tensor_model_parallel_region(values, group=self.group), self.group)


def _with_another_row(candidates: Tensor) -> Tensor:
    """A row of zeros at the end, which stands for all rows of other ranks."""
    return F.pad(candidates, (0, 0, 0, 0, 0, 1))
