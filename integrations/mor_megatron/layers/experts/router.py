"""Megatron's router over experts inside a recursion, with statistics per (step, expert) cell.

The steps share the router's weights, or each step has its own. Load, dropped tokens, balance
losses, the loss-free bias and the threshold on the number of experts are kept per step, because
each step runs a different set of tokens.

Legend: `t` tokens on this rank, `h` hidden, `e` experts, `r` recursion steps.
"""

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    router_gating_linear,
    topk_routing_with_score_function,
)
from torch import Tensor, nn

from mor_layers import RecursionConfig
from mor_layers.modules import PreciseBuffers
from mor_layers.routers import NUM_BINS, Thresholds
from mor_megatron.layers.experts.padding import PaddedTopKRouter
from mor_megatron.layers.sublayers.step_aware import StepAware


class ExpertCells(PreciseBuffers):
    """Sums per step over the tokens that a router has seen since `clear`, without padding."""

    load: Tensor
    """Tokens computed by each expert, `[r e]`."""
    drops: Tensor
    """Tokens dropped by each expert because it was full, `[r e]`."""
    scores: Tensor
    """Sum of the probabilities that the router gave each expert, `[r e]`."""
    squares: Tensor
    """Sum of logsumexp(logits)², whose mean is the z-loss, `[r]`."""
    tokens: Tensor
    """Number of tokens routed, `[r]`."""

    def __init__(self, num_recursions: int, num_experts: int, device: torch.device) -> None:
        super().__init__()
        for name, shape in (
            ("load", (num_recursions, num_experts)),
            ("drops", (num_recursions, num_experts)),
            ("scores", (num_recursions, num_experts)),
            ("squares", (num_recursions,)),
            ("tokens", (num_recursions,)),
        ):
            self.register_buffer(name, torch.zeros(shape, device=device), persistent=False)

    @torch.no_grad()
    def add(
        self, step: int, logits: Tensor, scores: Tensor, wanted: Tensor, taken: Tensor,
        is_padding: Tensor | None,
    ) -> None:  # fmt: skip
        """Add one forward pass of `step`."""
        squares = torch.logsumexp(logits.float(), dim=-1).square()
        count: int | Tensor = len(squares)
        if is_padding is not None:  # dropping rows would synchronise the device
            squares = squares.masked_fill(is_padding, 0)
            scores = scores.masked_fill(is_padding[:, None], 0)
            count = (~is_padding).sum()
        self.load[step] += taken.sum(dim=0)
        self.drops[step] += (wanted & ~taken).sum(dim=0)
        self.scores[step] += scores.sum(dim=0)
        self.squares[step] += squares.sum()
        self.tokens[step] += count

    def clear(self) -> None:
        """Set all sums to zero."""
        for buffer in self.buffers():
            buffer.zero_()


class StepExpertBias(PreciseBuffers):
    """The loss-free bias of one step.

    The names of its buffers are those by which `finalize_model_grads` finds and updates the bias.
    """

    expert_bias: Tensor
    local_tokens_per_expert: Tensor

    def __init__(self, num_experts: int, device: torch.device) -> None:
        super().__init__()
        zeros = torch.zeros(num_experts, dtype=torch.float32, device=device)
        self.register_buffer("local_tokens_per_expert", zeros, persistent=False)
        self.register_buffer("expert_bias", zeros.clone())


class StepGlobalLoad(PreciseBuffers):
    """Tokens of each expert in each step, summed over the micro-batches of a global batch."""

    load: Tensor
    """`[r e]`."""
    batches: Tensor
    """Micro-batches, `[r]`."""

    def __init__(self, num_recursions: int, num_experts: int, device: torch.device) -> None:
        super().__init__()
        load = torch.zeros(num_recursions, num_experts, device=device)
        self.register_buffer("load", load, persistent=False)
        self.register_buffer("batches", load.new_zeros(num_recursions), persistent=False)

    def mean_after(self, step: int, load: Tensor) -> Tensor:
        """The mean load of a step, `[e]`, after another micro-batch."""
        self.load[step] += load
        self.batches[step] += 1
        return self.load[step] / self.batches[step]

    def clear(self) -> None:
        """Begin another global batch."""
        self.load.zero_()
        self.batches.zero_()


class StepTopKRouter(StepAware, PaddedTopKRouter):
    """`TopKRouter` that knows which step it runs and does not count padding.

    Its balance losses are logged in two places. They are recorded in Megatron's metrics tracker, as
    Megatron's own router does, because Megatron's training loop prints the tracker's means over
    layers. The tracker has no room for values per (step, expert) cell; `routing_reports` reads
    those from `cells`. The pretraining command of `mor_tools` logs the reports and discards the
    tracker's values.
    """

    width_histograms: Tensor
    batch_size: Tensor
    """Tokens in the sequences of the micro-batch, whatever number of them runs the step."""

    def join_recursion(self, recursion: RecursionConfig) -> None:
        """Create what each step has of its own: weights, biases and thresholds, as configured."""
        steps, num_experts = recursion.num_recursions, self.config.num_moe_experts
        assert num_experts is not None
        device = self.weight.device
        self.has_own_weights = recursion.expert_routers == "per_step"
        if self.has_own_weights:
            self.weight = self._per_step(self.weight, steps)
            self.bias = None if self.bias is None else self._per_step(self.bias, steps)
        self.cells = ExpertCells(steps, num_experts, device)
        self.batch_size = torch.zeros((), device=device)
        if self.enable_expert_bias:
            # Not one buffer of shape [r e]: Megatron stacks the biases of all layers, which must
            # have the same shape.
            del self.expert_bias, self.local_tokens_per_expert
            self.biases = nn.ModuleList(StepExpertBias(num_experts, device) for _ in range(steps))
        if self.get_aux_loss_coeff("global_aux_loss"):
            del self.global_tokens_per_expert, self.ga_steps
            self.global_load = StepGlobalLoad(steps, num_experts, device)
        self.mean_experts = recursion.mean_experts
        if self.mean_experts is not None:
            self.widths = Thresholds(steps, "width").to(device)
            histograms = torch.zeros(steps, NUM_BINS, device=device)
            self.register_buffer("width_histograms", histograms, persistent=False)

    def _per_step(self, parameter: nn.Parameter, steps: int) -> nn.Parameter:
        own = nn.Parameter(torch.stack([parameter.detach()] * steps))
        if self.config.perform_initialization:
            for part in own.data.unbind():
                self.config.init_method(part)
        setattr(own, "sequence_parallel", self.config.sequence_parallel)  # noqa: B010
        return own

    def gating(self, input: Tensor) -> Tensor:
        if not self.has_own_weights:
            return super().gating(input)
        given = {"fp32": torch.float32, "fp64": torch.float64}
        dtype = given.get(self.config.moe_router_dtype or "", input.dtype)
        bias = None if self.bias is None else self.bias[self.step]
        return router_gating_linear(input, self.weight[self.step], bias, dtype)

    def routing(  # type: ignore[override]
        self, logits: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gating probabilities and the boolean routing map, `[t e]` each; padding goes to no
        expert.
        """
        batch = logits.shape[1]
        logits = logits.view(-1, self.num_experts)
        is_padding = None if padding_mask is None else padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=is_padding)
        probs, wanted = self._choose(logits)
        if is_padding is not None:
            wanted = wanted & ~is_padding[:, None]
        if self.mean_experts is not None:
            probs, wanted = self._narrow(logits, probs, wanted)
        taken = self._within_capacity(probs.detach(), wanted, is_padding)
        probs = probs * taken
        even, scores = compute_routing_scores_for_aux_loss(
            logits, self.topk, self.score_function, self.config.moe_router_fusion, is_padding
        )
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            chosen = even if self.mean_experts is None else wanted
            probs = self._balance(probs, scores, chosen, is_padding, batch)
        # Recomputation runs the forward pass twice, the first time without gradients. It is counted
        # once.
        if torch.is_grad_enabled() or not self.training:
            self.cells.add(self.step, logits, scores, wanted, taken, is_padding)
        if self.enable_expert_bias and torch.is_grad_enabled():
            self.biases[self.step].local_tokens_per_expert += taken.detach().sum(dim=0)
        return probs, taken

    def tokens_of_batch(self, routed: Tensor) -> Tensor:
        """All tokens of the micro-batch: a step's balance has the same weight however few run it."""
        return self.batch_size

    def reset_global_aux_loss_tracker(self) -> None:
        """Begin another global batch; `finalize_model_grads` calls this."""
        if self.get_aux_loss_coeff("global_aux_loss"):
            self.global_load.clear()

    @torch.no_grad()
    def advance(self) -> None:
        """Update the width thresholds from the global batches seen since the last call."""
        if self.mean_experts is None:
            return
        torch.distributed.all_reduce(self.width_histograms, group=self.tp_dp_cp_group)
        means = torch.tensor(self.mean_experts, device=self.width_histograms.device)
        self.widths.follow(self.width_histograms, (means - 1) / (self.topk - 1))
        self.width_histograms.zero_()

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.routing_type == "sinkhorn":
            return self.sinkhorn_load_balancing(logits)
        config = self.config
        return topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.biases[self.step].expert_bias if self.enable_expert_bias else None,
            fused=config.moe_router_fusion,
            router_replay=self.router_replay,
        )

    def _narrow(self, logits: Tensor, probs: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the best expert, and those of the others whose probability exceeds the threshold."""
        all_probs = logits.softmax(dim=-1, dtype=torch.float32).detach()
        best = torch.zeros_like(wanted).scatter(1, probs.argmax(dim=1, keepdim=True), True)
        further = wanted & ~best
        if self.training and torch.is_grad_enabled():
            histogram = self.widths.histogram(self.step, all_probs, further)
            self.width_histograms[self.step] += histogram
        above = all_probs > self.widths.current()[self.step]
        wanted = wanted & (best | above)
        probs = probs * wanted
        return probs / probs.sum(dim=-1, keepdim=True).clamp(min=1e-20), wanted

    @torch.no_grad()
    def _within_capacity(self, probs: Tensor, wanted: Tensor, is_padding: Tensor | None) -> Tensor:
        """Which of the wanted (token, expert) pairs fit into the experts' capacity, `[t e]`.

        Ranks that share a sequence decide over all its tokens together, so that the result does not
        depend on the number of ranks.
        """
        factor, num_experts = self.config.moe_expert_capacity_factor, self.num_experts
        if factor is None or factor * self.topk >= num_experts:
            return wanted
        count, group = len(wanted), self.tp_group
        valid = torch.ones_like(wanted[:, 0]) if is_padding is None else ~is_padding
        keys = torch.cat([probs.float().masked_fill(~wanted, -1), valid[:, None].float()], dim=1)
        is_spread = self.config.sequence_parallel and group.size() > 1
        if is_spread:
            keys = gather_from_sequence_parallel_region(keys, group=group)
        keys, valid = keys[:, :-1], keys[:, -1]
        capacity = (valid.double().sum() * self.topk / num_experts * factor).ceil()
        if self.config.moe_token_drop_policy == "position":
            rank = (keys >= 0).cumsum(dim=0) - 1
        else:
            order = keys.sort(dim=0, descending=True, stable=True).indices
            rows = torch.arange(len(keys), device=keys.device)[:, None].expand_as(order)
            rank = torch.empty_like(order).scatter_(0, order, rows)
        if is_spread:
            rank = rank[group.rank() * count : (group.rank() + 1) * count]
        return wanted & (rank < capacity)

    def _balance(
        self, probs: Tensor, scores: Tensor, chosen: Tensor, is_padding: Tensor | None, batch: int
    ) -> Tensor:
        """Attach Megatron's balance losses; tokens may have different numbers of experts.

        The loss is 0 for a rank on which no token runs the step. Megatron's own functions divide by
        the number of tokens and would return nan.
        """
        count = torch.full((), float(len(chosen)), device=chosen.device)
        if is_padding is not None:
            count = (~is_padding).sum().float()
        # One sum over all tokens, or one per sequence (rows are in sequence-first order).
        for name, log, groups in (
            ("aux_loss", "load_balancing_loss", 1),
            ("seq_aux_loss", "seq_load_balancing_loss", batch),
            ("global_aux_loss", "global_load_balancing_loss", 1),
        ):
            coefficient = self.get_aux_loss_coeff(name)
            if coefficient == 0:
                continue
            is_global = name == "global_aux_loss"
            group = self.tp_dp_cp_group if is_global else self.tp_cp_group
            shape = (-1, groups * self.num_experts)
            own, given = (x.reshape(shape).sum(dim=0) for x in (chosen, scores))
            total = torch.cat([own.float(), count[None]])
            total = reduce_from_tensor_model_parallel_region(total, group)
            load = total[:-1]
            if is_global:
                load = self.global_load.mean_after(self.step, load)
            share = load / load.sum().clamp(min=1)
            mean = given / (total[-1].clamp(min=1) / groups)
            probs = self.attach_and_log_load_balancing_loss(
                probs,
                coefficient,
                coefficient * self.num_experts * (share * mean).sum(),
                log,
                group,
                needs_dp_avg=not is_global,
                valid_token_count=count,
            )
        return probs
