"""What a router decides about the candidates of a step.

Legend: `b` batch, `s` sequence, `n` candidates of a step, `k` tokens that run it, `p` numbers per
token in a router's plan.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor_layers.selection.capacity import capacities, capacity
from mor_layers.selection.tokens import Tokens, take_rows


@dataclass(frozen=True)
class RoutingDecision:
    """Which candidates run a step. Nothing else is passed from one step to the next."""

    tokens: Tokens
    """The selected tokens, `[k b]`."""
    rows: Int[Tensor, "k b"] | None = None
    """Row of each selected token among the candidates; None: all candidates, in order."""
    gates: Float[Tensor, "k b"] | None = None
    """Factor by which the block's output is multiplied; None if the router does not gate."""
    plan: Float[Tensor, "k b p"] | None = None
    """What the router has planned for each selected token at later steps."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Auxiliary losses of this step by name, already multiplied by their coefficients."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Scalars for the log by name, detached."""
    observations: dict[str, Tensor] = field(default_factory=dict)
    """What `Router.adjust` needs from the global batch, such as histograms; summed over it."""

    @classmethod
    def everything(cls, tokens: Tokens) -> "RoutingDecision":
        """The decision before the first step: every token is a candidate."""
        return cls(tokens=tokens)

    def keep_all(self) -> "RoutingDecision":
        """A decision that keeps all tokens of this one, without sorting or gathering."""
        return RoutingDecision(self.tokens, plan=self.plan)

    def taken(self, values: Float[Tensor, "n b"]) -> Float[Tensor, "k b"]:
        """The selected tokens' entries of a tensor with one value per candidate."""
        if self.rows is None or len(values) == 1:  # a sequence's only candidate is where it was
            return values
        return values.gather(0, self.rows)

    def is_selected(self, num_candidates: int) -> Bool[Tensor, "n b"]:
        """Which candidates the decision kept."""
        tokens = self.tokens
        kept = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.positions.device)
        if tokens.is_padding is not None:
            kept = tokens.is_padding.logical_not()
        if self.rows is None:
            return kept
        return kept.new_zeros(num_candidates, kept.shape[1]).scatter(0, self.rows, kept)

    def with_plan(self, plan: Float[Tensor, "k b p"]) -> "RoutingDecision":
        """This decision with a plan for its tokens, which later selections carry on."""
        return replace(self, plan=plan)

    def with_gates(self, gates: Float[Tensor, "k b"]) -> "RoutingDecision":
        """This decision with factors for the block's output."""
        return replace(self, gates=gates)

    def with_losses(
        self, losses: dict[str, Tensor], metrics: dict[str, Tensor]
    ) -> "RoutingDecision":
        """This decision with auxiliary losses and metrics."""
        return replace(self, losses=losses, metrics=metrics)

    def with_observations(self, observations: dict[str, Tensor]) -> "RoutingDecision":
        """This decision with observations."""
        return replace(self, observations=observations)

    def keep_where(self, is_selected: Bool[Tensor, "n b"]) -> "RoutingDecision":
        """Keep the marked tokens, in order. Padding is left out even if it is marked.

        Sequences with fewer tokens than the widest one are filled with padding slots. This waits for
        the device once, to learn the width, unless each sequence has one candidate. The width is at
        least 1: a step whose tokens have all exited still runs on padding, so that every rank takes
        part in each collective and every parameter gets a gradient.
        """
        if self.tokens.is_padding is not None:
            is_selected = is_selected & ~self.tokens.is_padding
        if len(is_selected) == 1:  # each sequence's only candidate stays, if only as padding
            tokens = replace(self.tokens, is_padding=~is_selected, padding_trails=True)
            rows = torch.zeros_like(tokens.positions)
            return RoutingDecision(tokens, rows, plan=self.plan)
        width = max(1, int(is_selected.sum(dim=0).max()))
        rows = is_selected.logical_not().to(torch.uint8).sort(dim=0, stable=True).indices[:width]
        is_padding = is_selected.gather(0, rows).logical_not()
        return self._take(rows, is_padding)

    def rest(self, taken: "RoutingDecision") -> "RoutingDecision | None":
        """The tokens of this decision that the next one, `taken`, left out; None if there are none.

        Waits for the device once, like `keep_where`, unless every sequence lost equally many tokens.
        """
        if taken.rows is None:
            return None
        count = len(self.tokens.positions)
        is_left = taken.is_selected(count).logical_not()
        if self.tokens.is_padding is None and taken.tokens.is_padding is None:
            order = is_left.logical_not().to(torch.uint8).sort(dim=0, stable=True).indices
            return self._take(order[: count - len(taken.rows)], None)
        if self.tokens.is_padding is not None:
            is_left = is_left & ~self.tokens.is_padding
        return self.keep_where(is_left)

    def _take(self, rows: Tensor, is_padding: Tensor | None) -> "RoutingDecision":
        plan = None if self.plan is None else take_rows(self.plan, rows)
        return RoutingDecision(self.tokens.take(rows, is_padding), rows, plan=plan)

    def keep_valid(self) -> "RoutingDecision":
        """Keep every token, and move padding that stands between tokens to the end."""
        if self.tokens.padding_trails:
            return self.keep_all()
        assert self.tokens.is_padding is not None
        return self.keep_where(self.tokens.is_padding.logical_not())

    def keep_top(
        self, weights: Float[Tensor, "n b"], share: float, multiple: int = 1
    ) -> "RoutingDecision":
        """Keep the tokens with the largest weights in every document.

        Args:
            weights: one per candidate; only their order matters.
            share: share of the document's length, in (0, 1]. `capacity(share, length, multiple)`
                tokens are kept. A share of 1 keeps everything, and neither sorts nor gathers.
            multiple: what the number of tokens kept of a document is rounded up to a multiple of.
        """
        if share >= 1.0:
            return self.keep_valid()
        weights = weights.detach()
        if self.tokens.is_plain:
            kept = capacity(share, self.tokens.sequence_length, multiple)
            if kept == weights.shape[0]:
                return self.keep_all()
            rows = weights.topk(kept, dim=0, sorted=False).indices.sort(dim=0).values
            return self._take(rows, None)
        return self.keep_where(self._is_top(weights, share, multiple))

    def _is_top(
        self, weights: Float[Tensor, "n b"], share: float, multiple: int
    ) -> Bool[Tensor, "n b"]:
        tokens = self.tokens
        if tokens.is_padding is not None:
            weights = weights.masked_fill(tokens.is_padding, -torch.inf)
        # Two stable sorts order by document and then by weight; a token's rank is its place in its
        # document.
        order = weights.sort(dim=0, descending=True, stable=True).indices
        row = torch.arange(len(weights), device=weights.device)[:, None].expand_as(order)
        begin = torch.zeros_like(order)
        if tokens.documents is not None:
            documents, by_document = tokens.documents.gather(0, order).sort(dim=0, stable=True)
            order = order.gather(0, by_document)
            begins = documents[1:] != documents[:-1]
            begin[1:] = torch.where(begins, row[1:], 0)
            begin = begin.cummax(dim=0).values
        rank = torch.empty_like(order).scatter_(0, order, row - begin)
        lengths = tokens.document_lengths
        if lengths is None:  # plain until a ragged selection
            lengths = torch.full_like(rank, tokens.sequence_length)
        return rank < capacities(share, lengths, multiple)
