"""The experts of a mixture: dispatch -> compute -> combine.

Legend: `t` tokens, `h` hidden, `e` experts, `c` experts that a token may take, `a` assignments of a
token to an expert, `f` width of an expert.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mor_layers.layers.moe.router import Assignment
from mor_layers.recursion import Products


class Experts(nn.Module):
    """SwiGLU experts. A sort groups the tokens, and each expert runs once on its group."""

    def __init__(self, num_experts: int, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        into, out = (num_experts, ffn_hidden_size, hidden_size), (num_experts, hidden_size)
        self.gate = nn.Parameter(torch.empty(into).normal_(std=0.02))
        self.up = nn.Parameter(torch.empty(into).normal_(std=0.02))
        self.down = nn.Parameter(torch.empty(*out, ffn_hidden_size).normal_(std=0.02))

    def forward(
        self,
        hidden: Float[Tensor, "t h"],
        assignment: Assignment,
        products: Products | None = None,
    ) -> Float[Tensor, "t h"]:
        """Sum over each token's experts, weighted by its gates.

        Waits for the device once, to learn how many tokens each expert has.

        Args:
            products: computes the experts in generation.
        """
        num_experts, width = len(self.gate), assignment.experts.shape[1]
        expert = torch.where(assignment.is_taken, assignment.experts, num_experts).flatten()
        order = expert.argsort(stable=True)
        sizes = torch.bincount(expert, minlength=num_experts + 1)[:num_experts].tolist()
        order = order[: sum(sizes)]  # assignments that are not taken come last
        token = order // width
        groups = hidden[token].split(sizes)  # [t h] -> [a h]
        if products is not None:
            outputs = [
                products.expert(self, i, group) for i, group in enumerate(groups) if sizes[i]
            ]
        else:
            matrices = zip(self.gate.unbind(), self.up.unbind(), self.down.unbind(), strict=True)
            outputs = [
                F.linear(F.silu(F.linear(group, gate)) * F.linear(group, up), down)
                for group, (gate, up, down) in zip(groups, matrices, strict=True)
            ]
        gated = torch.cat(outputs) * assignment.gates.flatten()[order][:, None]
        return torch.zeros_like(hidden).index_add(0, token, gated)  # [a h] -> [t h]

    def of_all(
        self,
        hidden: Float[Tensor, "t h"],
        assignment: Assignment,
        products: Products | None = None,
    ) -> Float[Tensor, "t h"]:
        """The same, for graphs: every token runs every expert, whatever was chosen.

        Args:
            products: computes what was chosen in one operation of the graph, if it can.
        """
        chosen = None if products is None else products.chosen_experts(self, hidden, assignment)
        if chosen is not None:
            return chosen
        weights = torch.zeros(len(hidden), len(self.gate), dtype=hidden.dtype, device=hidden.device)
        gates = assignment.gates * assignment.is_taken
        weights = weights.scatter(1, assignment.experts, gates)  # [t c] -> [t e]
        every = hidden.expand(len(self.gate), -1, -1)  # [e t h]
        gate, up = (every.bmm(matrix.transpose(1, 2)) for matrix in (self.gate, self.up))
        outputs = (F.silu(gate) * up).bmm(self.down.transpose(1, 2))  # [e t f] -> [e t h]
        return torch.einsum("te,eth->th", weights, outputs)


class SharedExpert(Experts):
    """One SwiGLU expert that runs on every token."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__(1, hidden_size, ffn_hidden_size)

    def forward(  # type: ignore[override]
        self, hidden: Float[Tensor, "t h"], products: Products | None = None
    ) -> Float[Tensor, "t h"]:
        if products is not None:
            return products.expert(self, 0, hidden)
        gate, up = (F.linear(hidden, weight[0]) for weight in (self.gate, self.up))
        return F.linear(F.silu(gate) * up, self.down[0])
