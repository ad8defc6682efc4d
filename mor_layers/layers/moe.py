"""A mixture of experts that counts per recursion step: route -> dispatch -> compute -> combine.

All steps share the experts. They also share the router, or each step has its own. Balance is tracked
per (step, expert) cell: each cell has its own load, drops, losses and loss-free bias.

Sources: Shazeer et al. 2017; Fedus et al. 2021 (balance loss); Zoph et al. 2022 (z-loss); Wang et al.
2024, arXiv 2408.15664 (loss-free bias); DeepSeek-V2 and -V3 (arXiv 2405.04434, 2412.19437: a shared
expert, sigmoid scores, and routing limited to groups of experts). Losses of a layer that runs N_r times
are divided by N_r.

Legend: `b` batch, `k` tokens that run a step, `t` = `k · b`, `h` hidden, `e` experts, `c` experts
that a token may take, `a` assignments of a token to an expert, `f` width of an expert, `g` groups of
experts, `r` steps.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mor_layers.modules import PreciseBuffers
from mor_layers.recursion import ExpertUse, Products
from mor_layers.routers import Thresholds
from mor_layers.settings import check_types, require_choice

ExpertRouters = Literal["shared", "per_step"]
DropPolicy = Literal["probability", "position"]
ExpertScores = Literal["softmax", "sigmoid"]


MOST_EXPERTS = 4096
"""Largest number of experts of a layer. Each is a module, so a larger number in a damaged file is
refused before they are built."""


@dataclass(frozen=True)
class MoEConfig:
    """Settings of a mixture of experts that replaces an MLP."""

    num_experts: int
    """Number of experts. At least 1."""
    experts_per_token: int = 2
    """Experts per token, or the largest number of them if the router over depth sets a mean."""
    ffn_hidden_size: int | None = None
    """Width of an expert. Default: that of the MLP it replaces."""
    balance_coefficient: float = 0.01
    """Weight of the balance loss. 0: none."""
    z_loss_coefficient: float = 0.001
    """Weight of the z-loss. 0: none."""
    bias_update_rate: float = 0.0
    """How far the loss-free bias of each cell moves after an optimizer step. 0: no bias."""
    capacity_factor: float | None = None
    """An expert takes at most this many times its even share of a step's assignments, rounded up, and
    the rest is dropped. None: nothing is dropped."""
    drop_policy: DropPolicy | None = None
    """Which tokens a full expert keeps: those with the largest `probability` (default), which depends
    on later tokens, or those with the earliest `position`."""
    scores: ExpertScores = "softmax"
    """How logits become the experts' scores: `softmax`, or `sigmoid`, as in DeepSeek-V3."""
    normalizes_gates: bool = True
    """Whether the gates of a token's experts are divided by their sum. A single expert's gate is not, as
    it would become a constant 1."""
    gate_scale: float = 1.0
    """What gates are multiplied by. Above 0."""
    num_groups: int = 1
    """Groups of equal size that consecutive experts form; divides `num_experts`. A token's experts come
    from the `groups_per_token` groups whose best expert has the largest score; with sigmoid scores,
    whose best two have the largest sum."""
    groups_per_token: int = 1
    """See `num_groups`. Together, these groups have at least `experts_per_token` experts."""
    shared_ffn_hidden_size: int = 0
    """Width of an expert that runs on every token in addition to those of the router. 0: none."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.num_experts > MOST_EXPERTS:
            raise ValueError(
                f"MoEConfig.num_experts={self.num_experts} must be at most {MOST_EXPERTS}."
            )
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"MoEConfig.experts_per_token={self.experts_per_token} must lie in "
                f"1..num_experts={self.num_experts}."
            )
        for name in ("balance_coefficient", "z_loss_coefficient", "bias_update_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"MoEConfig.{name}={getattr(self, name)} must be 0 or more.")
        if self.ffn_hidden_size is not None and self.ffn_hidden_size < 1:
            raise ValueError(
                f"MoEConfig.ffn_hidden_size={self.ffn_hidden_size} must be at least 1."
            )
        if self.capacity_factor is not None and not 0 < self.capacity_factor < float("inf"):
            raise ValueError(f"MoEConfig.capacity_factor={self.capacity_factor} must be above 0.")
        require_choice("MoEConfig", "scores", self.scores, get_args(ExpertScores))
        if not 0 < self.gate_scale < float("inf"):
            raise ValueError(f"MoEConfig.gate_scale={self.gate_scale} must be above 0, and finite.")
        if self.shared_ffn_hidden_size < 0:
            raise ValueError(
                f"MoEConfig.shared_ffn_hidden_size={self.shared_ffn_hidden_size} must be 0 or more."
            )
        self._check_groups()
        if self.drop_policy is None:
            return
        require_choice("MoEConfig", "drop_policy", self.drop_policy, get_args(DropPolicy))
        if self.capacity_factor is None:
            raise ValueError(
                f"MoEConfig.drop_policy={self.drop_policy!r} has no effect without "
                "capacity_factor. Leave it out, or set a capacity."
            )

    def _check_groups(self) -> None:
        """Raise ValueError if the groups cannot hold a token's experts."""
        groups, taken, experts = self.num_groups, self.groups_per_token, self.num_experts
        if groups < 1 or experts % groups:
            raise ValueError(
                f"MoEConfig.num_groups={groups} must be at least 1, and divide num_experts={experts}."
            )
        size = experts // groups
        if not 1 <= taken <= groups or taken * size < self.experts_per_token:
            raise ValueError(
                f"MoEConfig.groups_per_token={taken} must lie in 1..num_groups={groups}, and groups of "
                f"{size} experts must hold experts_per_token={self.experts_per_token}."
            )
        if groups > 1 and self.scores == "sigmoid" and size < 2:
            raise ValueError(
                f"MoEConfig.num_groups={groups} with sigmoid scores needs at least two experts in each "
                f"group. Use at most {experts // 2}, or 1."
            )

    @property
    def beyond_plain(self) -> tuple[str, ...]:
        """The settings in use that a plain softmax over experts, without any other, does not have."""
        used = {
            "scores": self.scores != "softmax",
            "normalizes_gates": not self.normalizes_gates,
            "gate_scale": self.gate_scale != 1,
            "num_groups": self.num_groups > 1,
            "shared_ffn_hidden_size": self.shared_ffn_hidden_size > 0,
        }
        return tuple(name for name, is_used in used.items() if is_used)

    def shown_beyond_plain(self, owner: str = "MoEConfig.") -> str:
        """`beyond_plain` with their values, for messages."""
        return ", ".join(f"{owner}{name}={getattr(self, name)!r}" for name in self.beyond_plain)

    def check_mean(self, mean_experts: tuple[float, ...] | None) -> None:
        """Raise ValueError if a mean number of experts cannot be kept."""
        for mean in mean_experts or ():
            if not 1 <= mean <= self.experts_per_token or self.experts_per_token < 2:
                raise ValueError(
                    f"mean_experts={mean} must lie in 1..experts_per_token="
                    f"{self.experts_per_token}, which must be 2 or more."
                )


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


class MoE(nn.Module):
    """A mixture of experts that replaces an MLP. The other arguments are those of `ExpertRouter`.

    Args:
        ffn_hidden_size: width of an expert if the settings do not give it.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        config: MoEConfig,
        num_steps: int = 1,
        routers: ExpertRouters = "shared",
        mean_experts: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        width = config.ffn_hidden_size or ffn_hidden_size
        self.router = ExpertRouter(hidden_size, config, num_steps, routers, mean_experts)
        self.experts = Experts(config.num_experts, hidden_size, width)
        self.shared: SharedExpert | None = None
        if config.shared_ffn_hidden_size:
            self.shared = SharedExpert(hidden_size, config.shared_ffn_hidden_size)

    def forward(
        self,
        hidden: Float[Tensor, "k b h"],
        step: int | Int[Tensor, "k b"] = 0,
        is_padding: Bool[Tensor, "k b"] | None = None,
        products: Products | None = None,
        has_static_shapes: bool = False,
    ) -> tuple[Float[Tensor, "k b h"], ExpertUse]:
        """The layer's output. Experts of the router add nothing to padding, and to tokens that all of
        them dropped.

        Args:
            products: computes the experts in generation.
            has_static_shapes: whether shapes must not depend on the choice of experts, see
                `Experts.of_all`.
        """
        rows = hidden.flatten(0, 1)
        padding = None if is_padding is None else is_padding.flatten()
        step = step if isinstance(step, int) else step.expand(hidden.shape[:2]).flatten()
        assignment, use = self.router(rows, step, padding)
        if has_static_shapes:
            output = self.experts.of_all(rows, assignment, products)
        else:
            output = self.experts(rows, assignment, products)
        if self.shared is not None:
            output = output + self.shared(rows, products)
        return output.view_as(hidden), use


def _count(experts: Tensor, is_counted: Tensor, num_experts: int) -> Float[Tensor, " e"]:
    counts = torch.zeros(num_experts, device=experts.device)
    return counts.index_add(0, experts.flatten(), is_counted.flatten().float())
