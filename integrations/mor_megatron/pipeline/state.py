"""The state that a recursion sends between stages, and that a rank keeps for later steps.

Megatron's interleaved schedule sends one tensor of a fixed shape. A recursion needs more than hidden
states: which tokens run the step, their gates and the router's plan. All of this is sent as raw bits
in additional rows after the sequence. The schedule gets a sequence length that includes these rows.

    [ full: s rows | rows: the k tokens in the block, room for the widest step | bits ]

Gradients are sent back in the same positions. Gates and plans are fp32 in both directions, regardless
of the dtype of hidden states, because no operation between two stages interprets their rows.

Legend: `s` sequence, `b` batch, `h` hidden, `k` tokens that run a step, `p` numbers per token in a
router's plan. With sequence parallelism a rank holds its part of `full` and `rows`, and all bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mor_layers import RoutingDecision, StepContext, Tokens
from mor_megatron.parallel.carried import WORD_BYTES, CarriedRows


@dataclass(frozen=True)
class CarriedState:
    """The state of a microbatch between two stages."""

    full: Tensor
    """States of all tokens before the current step, `[s b h]`."""
    rows: Tensor
    """States of the tokens in the block, `[k b h]`. Between two steps, those of the candidates."""
    decision: RoutingDecision
    """The tokens that run the step. Its `rows` are indices into `full`."""


@dataclass(frozen=True)
class CarriedLayout(CarriedRows):
    """Packs a state into the tensor that stages send, and unpacks it. The same on all stages."""

    def pack(self, state: CarriedState, step: int) -> Tensor:
        """The tensor to send, `[rows b h]`. It is not a view."""
        if self.is_bare:
            return state.rows
        decision, tokens = state.decision, state.decision.tokens
        assert tokens.padding_trails
        positions = tokens.positions
        if tokens.is_padding is not None:
            positions = torch.where(tokens.is_padding, ~positions, positions)
        words = [positions.int()]
        if self.has_documents:
            lengths = tokens.document_lengths
            zero = torch.zeros_like(words[0])
            words.append(zero if tokens.documents is None else tokens.documents.int())
            words.append(zero + tokens.sequence_length if lengths is None else lengths.int())
        if self.has_gates[step]:
            assert decision.gates is not None
            words.append(decision.gates.float())
        if self.plan_sizes[step]:
            assert decision.plan is not None
            words += decision.plan.float().unbind(dim=-1)
        frame = _Frame(self, tokens.sequence_length, len(positions))
        return _Pack.apply(frame, state.full, state.rows, *words)  # type: ignore[return-value]

    def unpack(self, carried: Tensor, step: int) -> CarriedState:
        """The state that was packed at `step`."""
        s = self.sequence_length(len(carried))
        if self.is_bare:
            tokens = Tokens.whole_sequence(s, carried.shape[1], carried.device)
            return CarriedState(carried, carried, RoutingDecision.everything(tokens))
        k = self.width(step, s)
        if k is None:  # read from the tensor, which synchronizes with the device
            header = carried[len(carried) - self.bit_rows(s), 0].detach()
            k = int(header[: WORD_BYTES // self.itemsize].clone().view(torch.int32)[0])
        integers, gates = 1 + 2 * self.has_documents, self.has_gates[step]
        count = integers + gates + self.plan_sizes[step]
        full, rows, *words = _Unpack.apply(_Frame(self, s, k), integers, count, carried)
        position = words[0].long()
        documents = lengths = is_padding = None
        if self.has_documents:
            documents, lengths = words[1].long(), words[2].long()
        if self.has_documents or (self.shares is None and step > 0):
            is_padding = position < 0
            position = torch.where(is_padding, ~position, position)
        tokens = Tokens(position, s, documents, is_padding, lengths)
        decision = RoutingDecision(
            tokens,
            rows=None if is_padding is None and k == s else position,
            gates=words[integers] if gates else None,
            plan=torch.stack(words[integers + gates :], dim=-1) if self.plan_sizes[step] else None,
        )
        return CarriedState(full, rows, decision)


@dataclass(frozen=True)
class _Frame:
    """The layout of one tensor, for a sequence of `s` tokens of which `k` run the step."""

    layout: CarriedLayout
    s: int
    k: int

    def join(self, full: Tensor, rows: Tensor, words: Sequence[Tensor]) -> Tensor:
        layout = self.layout
        batch = full.shape[1]
        spare = layout.shard(layout.room(self.s)) - len(rows)
        header = torch.full((1, batch), self.k, dtype=torch.int32, device=full.device)
        # [1 b], [k b], ... -> [b words] -> [b elements] -> [b rows h] -> [rows b h]
        bits = torch.cat([header, *(word.view(torch.int32) for word in words)]).T.contiguous()
        bits = bits.view(full.dtype)
        size = layout.bit_rows(self.s) * layout.hidden_size
        bits = F.pad(bits, (0, size - bits.shape[1])).unflatten(1, (-1, layout.hidden_size))
        return torch.cat([full, F.pad(rows, (0, 0, 0, 0, 0, spare)), bits.transpose(0, 1)])

    def split(self, carried: Tensor, count: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        layout, end = self.layout, self.s // self.layout.ranks
        elements = (1 + count * self.k) * WORD_BYTES // layout.itemsize
        bits = carried[len(carried) - layout.bit_rows(self.s) :].transpose(0, 1).flatten(1)
        words = bits[:, :elements].contiguous().view(torch.int32).T[1:].contiguous()
        rows = carried[end : end + layout.shard(self.k)]
        return carried[:end], rows, list(words.split(self.k)) if count else []


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frame: _Frame, full: Tensor, rows: Tensor, *words: Tensor) -> Tensor:
        ctx.frame = frame
        ctx.is_float = [word.is_floating_point() for word in words]
        return frame.join(full, rows, words)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        full, rows, words = ctx.frame.split(gradients[0], len(ctx.is_float))
        floats = [
            word.view(torch.float32) if is_float else None
            for word, is_float in zip(words, ctx.is_float, strict=True)
        ]
        return None, full, rows, *floats


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frame: _Frame, integers: int, count: int, carried: Tensor) -> Any:
        full, rows, words = frame.split(carried, count)
        floats = [word.view(torch.float32) for word in words[integers:]]
        ctx.frame, ctx.count = frame, count
        ctx.like = (full.shape, rows.shape, carried.dtype, carried.device)
        ctx.mark_non_differentiable(*words[:integers])
        ctx.set_materialize_grads(False)
        return full, rows, *words[:integers], *floats

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, full: Tensor | None, rows: Tensor | None, *words: Any
    ) -> Any:
        full_shape, rows_shape, dtype, device = ctx.like
        full = torch.zeros(full_shape, dtype=dtype, device=device) if full is None else full
        rows = torch.zeros(rows_shape, dtype=dtype, device=device) if rows is None else rows
        none = torch.zeros(ctx.frame.k, full.shape[1], device=device)
        words = tuple(none if word is None else word.contiguous() for word in words)
        return None, None, None, ctx.frame.join(full, rows, words)


class GradientsOfLaterSteps(torch.autograd.Function):
    """Identity on hidden states whose backward pass adds the gradients from later steps.

    Later steps use tensors of step 1 on the same rank, but each step has its own autograd graph. Their
    graphs contain leaves in place of these tensors. When the backward pass of step 1 begins, the
    gradients of all leaves are complete, because the backward passes of the steps run in reverse
    order.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaves: list[Tensor], *originals: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        learned = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return gradients[0], None, *learned


@dataclass
class Flight:
    """The state that a rank keeps for the later steps of one microbatch."""

    context: StepContext | None = None
    """The context of the previous step, with leaves in place of step 1's keys and values."""
    origin: Tensor | None = None
    """The states that entered the recursion, as a leaf. None if no later step needs them."""
    leaves: list[Tensor] = field(default_factory=list)
    """The leaves that replace tensors of step 1 in the graphs of later steps."""
    tokens: Tokens | None = None
    """The tokens of the whole sequence. Only on the rank that routes."""
    decisions: list[RoutingDecision] = field(default_factory=list)
    """The decisions of the steps so far. Only on the rank that routes."""
