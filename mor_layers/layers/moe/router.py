"""The router of a mixture of experts: scores, groups, capacity, and what is counted for each step.

Sources: Fedus et al. 2021 (balance loss); Zoph et al. 2022 (z-loss); Wang et al. 2024, arXiv 2408.15664
(loss-free bias); DeepSeek-V3 (arXiv 2412.19437: sigmoid scores, and routing limited to groups of
experts). Losses of a layer that runs N_r times are divided by N_r.

Legend: `t` tokens, `h` hidden, `e` experts, `c` experts that a token may take, `g` groups of experts,
`r` steps.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mor_layers.layers.moe.config import ExpertRouters, MoEConfig
from mor_layers.modules import PreciseBuffers
from mor_layers.recursion import ExpertUse
from mor_layers.routers import Thresholds


@dataclass(frozen=True)
class Assignment:
    """Which experts each token takes."""

    experts: Int[Tensor, "t c"]
    gates: Float[Tensor, "t c"]
    is_taken: Bool[Tensor, "t c"]
    """False for unused choices, for choices of a full expert, and for padding."""


class ExpertRouter(PreciseBuffers):
    """Scores experts; a token takes those with the largest scores, or scores plus bias.

    Args:
        hidden_size: size of the tokens' states.
        config: settings of the layer.
        num_steps: number of recursion steps that the layer runs in.
        routers: whether the steps share one router.
        mean_experts: mean number of experts per token at each step. A token takes the best expert, and
            those of the next best whose probability exceeds a threshold that keeps the mean. None:
            always `experts_per_token`.
    """

    bias: Float[Tensor, "r e"]

    def __init__(
        self,
        hidden_size: int,
        config: MoEConfig,
        num_steps: int = 1,
        routers: ExpertRouters = "shared",
        mean_experts: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        config.check_mean(mean_experts)
        self.config, self.num_steps, self.mean_experts = config, num_steps, mean_experts
        count = num_steps if routers == "per_step" else 1
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(config.num_experts, hidden_size).normal_(std=0.02))
            for _ in range(count)
        )
        if config.bias_update_rate:
            self.register_buffer("bias", torch.zeros(num_steps, config.num_experts))
        self.widths = None if mean_experts is None else Thresholds(num_steps, "width")

    def forward(
        self,
        hidden: Float[Tensor, "t h"],
        step: int | Int[Tensor, " t"],
        is_padding: Bool[Tensor, " t"] | None,
    ) -> tuple[Assignment, ExpertUse]:
        """Assign tokens to experts. In generation, tokens may be at different steps."""
        if isinstance(step, Tensor) and len(self.weights) > 1:
            every = F.linear(hidden.float(), torch.cat(tuple(self.weights)).float())
            row = torch.arange(len(step), device=step.device)
            logits = every.unflatten(-1, (len(self.weights), -1))[row, step]
        else:
            weight = self.weights[step if len(self.weights) > 1 else 0]
            logits = F.linear(hidden.float(), weight.float())
        is_softmax = self.config.scores == "softmax"
        probabilities = logits.softmax(dim=-1) if is_softmax else logits.sigmoid()
        ranking = probabilities.detach()
        if self.config.bias_update_rate:
            ranking = ranking + self.bias[step]
        if self.config.num_groups > 1:
            ranking = ranking.masked_fill(~self._is_in_group(ranking), -torch.inf)
        experts = ranking.topk(self.config.experts_per_token, dim=-1).indices
        chosen = probabilities.gather(-1, experts)
        is_wanted = torch.ones_like(experts, dtype=torch.bool)
        if self.widths is not None:
            is_wanted[:, 1:] = chosen[:, 1:] > self.widths.current()[step, None]
        if is_padding is not None:
            is_wanted &= ~is_padding[:, None]
        gates = chosen  # a single expert's gate must not be renormalised to a constant 1
        if self.config.experts_per_token > 1 and self.config.normalizes_gates:
            taken = chosen * is_wanted
            gates = taken / taken.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        if self.config.gate_scale != 1:
            gates = gates * self.config.gate_scale
        is_taken = self._within_capacity(experts, chosen, is_wanted, is_padding)
        use = self._account(logits, probabilities, experts, is_wanted, is_taken, step, is_padding)
        return Assignment(experts, gates.to(hidden.dtype), is_taken), use

    def _is_in_group(self, ranking: Float[Tensor, "t e"]) -> Bool[Tensor, "t e"]:
        """Which experts belong to the groups that a token may choose from."""
        groups = ranking.unflatten(-1, (self.config.num_groups, -1))  # [t e] -> [t g e/g]
        best = groups.topk(1 if self.config.scores == "softmax" else 2, dim=-1).values.sum(dim=-1)
        taken = best.topk(self.config.groups_per_token, dim=-1).indices
        is_taken = torch.zeros_like(best, dtype=torch.bool).scatter(-1, taken, True)  # [t g]
        return is_taken[..., None].expand_as(groups).flatten(-2)

    @torch.no_grad()
    def advance(
        self, step: int, wanted: Float[Tensor, " e"], histogram: Float[Tensor, " bins"] | None
    ) -> None:
        """Move this step's biases and width threshold after an optimizer step.

        Args:
            wanted: how many tokens of the global batch chose each expert, including dropped ones.
            histogram: histogram of the global batch, if a mean number of experts is kept.
        """
        if self.config.bias_update_rate:
            self.bias[step] += self.config.bias_update_rate * (wanted.mean() - wanted).sign()
        if self.widths is not None and self.mean_experts is not None and histogram is not None:
            share = (self.mean_experts[step] - 1) / (self.config.experts_per_token - 1)
            histograms = histogram.new_zeros(self.num_steps, len(histogram))
            histograms[step] = histogram
            self.widths.follow(histograms, histogram.new_full((self.num_steps,), share))

    def _within_capacity(
        self, experts: Tensor, chosen: Tensor, is_wanted: Tensor, is_padding: Tensor | None
    ) -> Tensor:
        factor, num_experts = self.config.capacity_factor, self.config.num_experts
        if factor is None:
            return is_wanted
        tokens = is_wanted.new_full((), len(experts), dtype=torch.float64)
        if is_padding is not None:
            tokens = is_padding.logical_not().sum().double()
        capacity = (tokens * self.config.experts_per_token / num_experts * factor).ceil()
        flat = torch.where(is_wanted, experts, num_experts).flatten()
        # Two stable sorts order by expert, and then by priority.
        order = torch.arange(len(flat), device=flat.device)
        if self.config.drop_policy != "position":
            order = chosen.detach().flatten().sort(descending=True, stable=True).indices
        by_expert = flat[order].sort(stable=True)
        order = order[by_expert.indices]
        begins = torch.searchsorted(by_expert.values, by_expert.values)
        rank = torch.empty_like(flat)
        rank[order] = torch.arange(len(flat), device=flat.device) - begins
        return is_wanted & (rank < capacity).view_as(is_wanted)

    def _account(
        self,
        logits: Tensor,
        probabilities: Tensor,
        experts: Tensor,
        is_wanted: Tensor,
        is_taken: Tensor,
        step: int | Tensor,
        is_padding: Tensor | None,
    ) -> ExpertUse:
        num_experts = self.config.num_experts
        wanted, load = (_count(experts, x, num_experts) for x in (is_wanted, is_taken))
        counted = None if is_padding is None else is_padding.logical_not()
        # Without tokens the loss is 0: a mean over nothing must stay finite.
        z = torch.logsumexp(logits, dim=-1).square()
        shares = probabilities
        if self.config.scores == "sigmoid":  # DeepSeek-V3, equation 17
            shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        if counted is None:
            mean, z = shares.mean(dim=0), z.mean()
        else:
            count = counted.sum().clamp(min=1)
            mean = shares.masked_fill(~counted[:, None], 0).sum(dim=0) / count
            z = z.masked_fill(~counted, 0).sum() / count
        share = wanted / wanted.sum().clamp(min=1)
        raw = {"expert_balance_loss": num_experts * (share * mean).sum(), "expert_z_loss": z}
        weights = {
            "expert_balance_loss": self.config.balance_coefficient,
            "expert_z_loss": self.config.z_loss_coefficient,
        }
        return ExpertUse(
            load,
            wanted - load,
            {n: weights[n] / self.num_steps * loss for n, loss in raw.items() if weights[n]},
            {name: loss.detach() for name, loss in raw.items()},
            self._histogram(probabilities, experts, step, counted),
        )

    def _histogram(
        self, probabilities: Tensor, experts: Tensor, step: int | Tensor, counted: Tensor | None
    ) -> Tensor | None:
        if self.widths is None or not self.training:
            return None
        assert isinstance(step, int), "training runs one step at a time"
        further = probabilities.detach().gather(-1, experts)[:, 1:]
        is_counted = None if counted is None else counted[:, None].expand_as(further)
        return self.widths.histogram(step, further, is_counted)


def _count(experts: Tensor, is_counted: Tensor, num_experts: int) -> Float[Tensor, " e"]:
    counts = torch.zeros(num_experts, device=experts.device)
    return counts.index_add(0, experts.flatten(), is_counted.flatten().float())
