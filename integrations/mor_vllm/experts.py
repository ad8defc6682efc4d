"""A mixture of experts whose shapes do not depend on the router and that never waits for the device.

Ours instead of vLLM's fused layer, which does not support a varying number of experts per token, a
router for each step or its loss-free bias, and whose interface changes from release to release. The
experts that a token takes must be those of training.

Ranks hold part of every expert, along its width, or under expert parallelism (vLLM's
`--enable-expert-parallel`) whole experts. Every rank has all routers and all tokens, computes what it
can, and an all-reduce adds the results; so expert parallelism needs no exchange of tokens.

Legend: `t` tokens of a batch, from any requests; `h` hidden, `e` experts, `l` experts on this rank,
`f` width of an expert on this rank, `c` experts that a token may take, `a` assignments of a token to
an expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from vllm.distributed import (  # type: ignore[import-not-found]
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from mor_layers import DecoderConfig
from mor_layers.layers import Assignment, ExpertRouter
from mor_vllm.attention import ServedStep
from mor_vllm.precision import in_fp32
from mor_vllm.projections import sharded

# A grouped matrix product needs rows whose length is a multiple of 16 bytes.
_ALIGNMENT = 8


class ShardedMoE(nn.Module):
    """A mixture of experts that replaces the MLP of a layer that runs in `num_steps` steps."""

    def __init__(self, config: DecoderConfig, num_steps: int, vllm_config: Any) -> None:
        super().__init__()
        assert config.moe is not None
        recursion = config.effective_recursion
        of_steps = (num_steps, recursion.expert_routers, recursion.mean_experts)
        with in_fp32():
            self.router = ExpertRouter(
                config.hidden_size, config.moe, *(of_steps if num_steps > 1 else ())
            )
        self.experts = ShardedExperts(
            config.moe.num_experts,
            config.hidden_size,
            config.moe.ffn_hidden_size or config.ffn_hidden_size,
            vllm_config.parallel_config.enable_expert_parallel,
        )

    def forward(self, hidden: Float[Tensor, "t h"], context: ServedStep) -> Float[Tensor, "t h"]:
        padding = context.tokens.is_padding
        padding = None if padding is None else padding[0]  # [1 t] -> [t]
        assignment, _ = self.router(hidden, context.step, padding)
        return tensor_model_parallel_all_reduce(self.experts(hidden, assignment))


class ShardedExperts(nn.Module):
    """This rank's part of SwiGLU experts."""

    def __init__(
        self, num_experts: int, hidden_size: int, ffn_hidden_size: int, whole_experts: bool
    ) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        if whole_experts:
            self.num_experts, width, dims = num_experts // ranks, ffn_hidden_size, (0, 0, 0)
            own = self.num_experts
        else:
            self.num_experts, width, dims = num_experts, ffn_hidden_size // ranks, (1, 1, 2)
            own = width
        self.first = get_tensor_model_parallel_rank() * self.num_experts if whole_experts else 0
        # Numbers beyond the width are 0, and add nothing.
        padded = -(-width // _ALIGNMENT) * _ALIGNMENT
        into = self.num_experts, padded, hidden_size
        out = self.num_experts, hidden_size, padded
        self.gate, self.up, self.down = (
            sharded(shape, dim, own) for shape, dim in zip((into, into, out), dims, strict=True)
        )

    def forward(self, hidden: Float[Tensor, "t h"], assignment: Assignment) -> Float[Tensor, "t h"]:
        """The sum over those of each token's experts that are on this rank, weighted by its gates."""
        experts = assignment.experts - self.first
        is_here = (experts >= 0) & (experts < self.num_experts) & assignment.is_taken
        weights = self.gate, self.up, self.down
        return grouped_experts(hidden, *weights, experts, assignment.gates, is_here)


# An operation of its own, because torch.compile refuses grouped products of dtypes that the kernels do
# take.
@torch.library.custom_op("mor_vllm::grouped_experts", mutates_args=())
def grouped_experts(
    hidden: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    experts: Tensor,
    gates: Tensor,
    is_taken: Tensor,
) -> Tensor:
    """SwiGLU experts on their tokens, as in `mor_layers.layers.moe`, without waiting for the device.

    Args:
        hidden: `[t h]`.
        gate, up: `[l f h]`.
        down: `[l h f]`.
        experts, gates, is_taken: `[t c]`, numbers of experts, their weights, and which count.
    """
    num_experts, width = len(gate), experts.shape[1]
    expert = torch.where(is_taken, experts, num_experts).flatten()
    by_expert, order = expert.sort(stable=True)  # assignments that do not count come last
    numbers = torch.arange(1, num_experts + 1, device=expert.device)
    ends = torch.searchsorted(by_expert, numbers).int()
    token = order // width
    rows = hidden[token]  # [t h] -> [a h]
    gated = F.grouped_mm(rows, gate.mT, offs=ends)
    inner = F.silu(gated) * F.grouped_mm(rows, up.mT, offs=ends)
    outputs = F.grouped_mm(inner, down.mT, offs=ends) * gates.flatten()[order][:, None]
    # Rows after the last end have not been written.
    outputs = outputs.masked_fill((by_expert == num_experts)[:, None], 0)
    return torch.zeros_like(hidden).index_add(0, token, outputs)  # [a h] -> [t h]


@grouped_experts.register_fake
def _(hidden: Tensor, *others: Tensor) -> Tensor:
    return torch.empty_like(hidden)
