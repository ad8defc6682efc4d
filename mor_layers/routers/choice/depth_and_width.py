"""Depth planned by thresholds that keep given shares, optionally with a mean number of experts.

This router is ours and unpublished. The depth of every token is planned from the state that enters
the recursion:

    a = router(rmsnorm(H_1))                     step 1 always runs
    go_r = go_{r-1} and a_r > tau_r              r = 2 .. N_r
    g_r = sigmoid(a_r - tau_r)
    x <- f(x)                                    at r = 1
    x <- x + (1 + g_r - stopgrad(g_r)) (f(x) - x)   later: replaces the state, gradient reaches g_r

`tau_r` follows the quantile, over the global batch, at which the wanted share of the tokens that ran
step r-1 run step r, so no balance loss over depth is needed. The threshold cancels whatever shifts the
logits of all tokens together, and the gradient of a gate must not cause such a shift: it uses `a_r`
relative to its mean over the sequence. Otherwise all logits would drift together, faster than a
threshold can follow.

A decision depends only on its own token, so generation needs no predictor. The router works well with
`exit_state` keys and values. With `mean_experts`, layers with experts keep that mean in the same way
(`mor_layers.layers.moe`). `turn_dial` shifts both kinds of thresholds at inference.

Legend: `b` batch, `n` candidates of a step, `k` tokens selected, `r` steps after the first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_layers.routers.base import Router, RouterConfig, StepScores
from mor_layers.routers.choice.expert_choice import Architecture
from mor_layers.routers.declarations import ScorerMatrix, StepNotes
from mor_layers.routers.registry import register_router
from mor_layers.routers.scorer import Scorer, bar_above, scorer_matrices
from mor_layers.routers.thresholds import Thresholds
from mor_layers.selection import RoutingDecision
from mor_layers.settings import check_types, require_choice


@register_router("depth_and_width")
@dataclass(frozen=True)
class DepthAndWidth(RouterConfig):
    """Settings of the depth-and-width router."""

    continue_shares: tuple[float, ...] | None = None
    """For each step after the first, the share of the previous step's tokens that run it. In (0, 1).
    Default: (N_r-r+1)/(N_r-r+2), so that equally many tokens exit at every step."""
    mean_experts: float | None = None
    """Mean number of experts per token at each step: the best expert, and those of the next best whose
    probability exceeds a threshold. None: the layers' own number, with or without experts."""
    architecture: Architecture = "linear"
    """Scorer: `linear` (h → N_r-1) or `mlp` (h → 2h → N_r-1, GELU)."""
    rate: float = 0.3
    """Fraction of the distance to the quantile that thresholds move per optimizer step. In (0, 1]."""

    def __post_init__(self) -> None:
        check_types(self)
        name = "DepthAndWidth"
        require_choice(name, "architecture", self.architecture, get_args(Architecture))
        if not 0 < self.rate <= 1:
            raise ValueError(f"{name}.rate={self.rate} must lie in (0, 1].")
        if self.mean_experts is not None and not 1 <= self.mean_experts < float("inf"):
            raise ValueError(f"{name}.mean_experts={self.mean_experts} must be 1 or more.")
        if not all(0 < share < 1 for share in self.continue_shares or ()):
            raise ValueError(
                f"{name}.continue_shares={self.continue_shares} has an entry outside (0, 1)."
            )

    def shares_for(self, num_recursions: int) -> tuple[float, ...]:
        """`continue_shares`, or their default."""
        if self.continue_shares is not None:
            return self.continue_shares
        return tuple(
            (num_recursions - r) / (num_recursions - r + 1) for r in range(1, num_recursions)
        )

    @property
    def needs_updates(self) -> bool:
        return True

    def validate(self, num_recursions: int) -> None:
        if num_recursions < 2:
            raise ValueError(
                f"DepthAndWidth has nothing to plan with num_recursions={num_recursions}. Use 2 or "
                "more, or router FixedDepth."
            )
        shares = self.shares_for(num_recursions)
        if len(shares) != num_recursions - 1:
            raise ValueError(
                f"DepthAndWidth.continue_shares={shares} has {len(shares)} entries for "
                f"{num_recursions} recursions. Use {num_recursions - 1}, or leave it out."
            )

    def capacity_factors_for(self, num_recursions: int) -> tuple[float, ...]:
        return tuple(accumulate((1.0, *self.shares_for(num_recursions)), mul))

    def mean_experts_for(self, num_recursions: int) -> tuple[float, ...] | None:
        return None if self.mean_experts is None else (self.mean_experts,) * num_recursions

    @property
    def is_causal(self) -> bool:
        return True

    def scorer_shapes(
        self, hidden_size: int, num_recursions: int
    ) -> tuple[tuple[ScorerMatrix, ...], ...]:
        scorer = scorer_matrices(self.architecture, hidden_size, num_recursions - 1)
        return (scorer, *((),) * (num_recursions - 1))

    def notes_for(self, num_recursions: int) -> tuple[StepNotes, ...]:
        # The depth, and the gates of the steps after the first.
        return (StepNotes(plan_size=num_recursions),) * num_recursions

    def build(self, hidden_size: int, num_recursions: int) -> "DepthAndWidthRouter":
        return DepthAndWidthRouter(self, hidden_size, num_recursions)


class DepthAndWidthRouter(Router):
    """Plans `(depth, gates of the later steps)` of each token at the first step."""

    def __init__(self, config: DepthAndWidth, hidden_size: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.shares = config.shares_for(num_recursions)
        self.scorer = Scorer(config.architecture, hidden_size, num_recursions - 1)
        for weight in self.scorer.weights:
            # Logits of unit spread, so that the optimizer does not move them faster than thresholds.
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        self.depths = Thresholds(num_recursions - 1, "depth", config.rate)

    def logits(self, hidden: Tensor, step: int) -> Tensor | None:
        if step > 0:
            return None
        return self.scorer(F.rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-5))

    def decide(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
    ) -> RoutingDecision:
        if step > 0:
            assert previous.plan is not None
            is_selected = previous.plan[..., 0] >= step
            if previous.tokens.is_padding is not None:
                is_selected = is_selected & ~previous.tokens.is_padding
            return previous.keep_where(is_selected)
        assert logits is not None
        thresholds = self.depths.current()
        goes_on = (logits.detach() > thresholds).cumprod(dim=-1)  # [n b r]
        # [n b 1] + [n b r] -> [n b 1+r]: the depth is a small whole number, exact in fp32
        depth = goes_on.sum(dim=-1, keepdim=True).to(logits.dtype)
        mean = masked_means(logits, previous.tokens.is_padding)
        centred = logits - thresholds - (mean - mean.detach())
        plan = torch.cat([depth, centred.sigmoid()], dim=-1)
        return previous.with_plan(plan).keep_valid()

    def assess(
        self,
        logits: Tensor | None,
        step: int,
        previous: RoutingDecision,
        decision: RoutingDecision,
    ) -> RoutingDecision:
        if logits is None or not self.training:
            return decision
        return decision.with_observations({"depth_histograms": self._observe(logits, previous)})

    def combine(
        self,
        step: int,
        selected: Tensor,
        output: Tensor,
        decision: RoutingDecision,
        origin: Tensor | None,
    ) -> Tensor:
        if step == 0:
            return output
        assert decision.plan is not None
        gate = decision.plan[..., step, None].to(output.dtype)
        return selected + (1 + gate - gate.detach()) * (output - selected)

    def scores(self, logits: Tensor, step: int) -> tuple[StepScores, ...]:
        """The gates of the later steps, above one half if a logit is above its threshold."""
        gates = (logits - self.depths.current()).sigmoid().unbind(dim=-1)
        return tuple(StepScores(later, gate, 0.5) for later, gate in enumerate(gates, start=1))

    @torch.no_grad()
    def tune(self, shares: tuple[float, ...], observe: Callable[[int], Tensor]) -> None:
        if shares[0] < 1.0:
            raise ValueError(f"shares={shares}: DepthAndWidth runs step 1 for every token. Use 1.")
        logits = observe(0)
        total = len(logits)
        for index, share in enumerate(shares[1:]):
            bar = bar_above(logits[:, index], share * total) - self.depths.shift
            self.depths.values[index] = bar
            logits = logits[logits[:, index] > bar + self.depths.shift]

    def adjust(self, observations: dict[str, Tensor]) -> None:
        if "depth_histograms" in observations:
            histograms = observations["depth_histograms"]
            self.depths.follow(histograms, torch.tensor(self.shares, device=histograms.device))

    def _observe(self, logits: Tensor, previous: RoutingDecision) -> Tensor:
        is_candidate = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        if previous.tokens.is_padding is not None:
            is_candidate = ~previous.tokens.is_padding
        histograms = []
        for index in range(len(self.shares)):
            values = logits[..., index].detach()
            histograms.append(self.depths.histogram(index, values, is_candidate))
            is_candidate = is_candidate & (values > self.depths.values[index])
        return torch.stack(histograms)


def masked_means(values: Tensor, is_padding: Tensor | None) -> Tensor:
    """Mean of `[n b r]` over the tokens of each sequence, `[1 b r]`."""
    if is_padding is None:
        return values.mean(dim=0, keepdim=True)
    kept = values.masked_fill(is_padding[..., None], 0).sum(dim=0, keepdim=True)
    return kept / is_padding.logical_not().sum(dim=0).clamp(min=1)[None, :, None]
