"""The state that a recursion sends between stages, and that a rank keeps for later steps.

Megatron's interleaved schedule sends one tensor of a fixed shape. A recursion needs more than hidden
states: which tokens run the step, their gates and the router's plan. All of this is sent as raw bits
in additional rows after the sequence. The schedule gets a sequence length that includes these rows.

    [ full: n·s rows | rows: the k tokens in the block, room for the widest step | bits ]

Tokens that carry `n` hidden states between steps (a `LoopState`) take `n` rows each. Within a step, a
token in the block takes one. Gradients are sent back in the same positions. Gates, plans and notes are
fp32 in both directions, regardless of the dtype of hidden states, because no operation between two
stages interprets their rows.

Legend: `s` sequence, `b` batch, `h` hidden, `k` tokens that run a step, `n` hidden states that a token
carries, `p` numbers per token in a router's plan, `m` in the notes of a loop state. With sequence or
context parallelism a rank holds its part of `full` and `rows`, and all bits.
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
    """What all tokens carried before the current step, `[s b nh]`."""
    rows: Tensor
    """States of the tokens in the block, `[k b h]`. Between two steps, what the candidates carry,
    `[k b nh]`."""
    decision: RoutingDecision
    """The tokens that run the step. Its `rows` are indices into `full`."""
    notes: Tensor | None = None
    """The notes of the loop state about the tokens of the step, `[k b m]`. Between two steps, nobody
    reads them."""
    trains: bool = True
    """Whether gradients go through the step. The first rank knows it from its router."""


@dataclass(frozen=True)
class CarriedLayout(CarriedRows):
    """Packs a state into the tensor that stages send, and unpacks it. The same on all stages."""

    def pack(self, state: CarriedState, step: int, sequence: Tokens) -> Tensor:
        """The tensor to send, `[rows b h]`. It is not a view.

        Args:
            sequence: the tokens of the whole sequence.
        """
        if self.is_bare:
            return state.rows
        decision, tokens = state.decision, state.decision.tokens
        assert tokens.padding_trails
        positions = tokens.positions
        if tokens.is_padding is not None:
            positions = torch.where(tokens.is_padding, ~positions, positions)
        words = [_document_words(sequence)] if self.has_documents else []
        words.append(positions.int())
        if self.has_gates[step]:
            assert decision.gates is not None
            words.append(decision.gates.float())
        if self.plan_sizes[step]:
            assert decision.plan is not None
            words += decision.plan.float().unbind(dim=-1)
        if self.num_notes:
            assert state.notes is not None
            words += state.notes.unbind(dim=-1)
        states = state.rows.shape[-1] // self.hidden_size
        assert state.trains or self.shares is None, "no place to say that a step does not train"
        frame = _Frame(self, tokens.sequence_length, len(positions), states, state.trains)
        return _Pack.apply(frame, state.full, state.rows, *words)  # type: ignore[return-value]

    def sequence(self, carried: Tensor) -> Tokens:
        """The tokens of the whole sequence that a packed tensor is about."""
        s, batch = self.sequence_length(len(carried)), carried.shape[1]
        if not self.has_documents:
            return Tokens.whole_sequence(s, batch, carried.device)
        words = _Frame(self, s, 0, 1).words(carried.detach(), 1 + s)[1:]
        is_padding = words < 0
        documents = torch.where(is_padding, ~words, words).long()
        return Tokens.whole_sequence(s, batch, carried.device, documents, is_padding)

    def unpack(
        self, carried: Tensor, step: int, sequence: Tokens, is_between: bool = False
    ) -> CarriedState:
        """The state that was packed at `step`.

        Args:
            sequence: the tokens of the whole sequence.
            is_between: whether the step has ended, so that `rows` are what the tokens carry.
        """
        s = sequence.sequence_length
        if self.is_bare:
            return CarriedState(carried, carried, RoutingDecision.everything(sequence))
        k, trains = self.width(step, s), True
        if k is None:  # read from the tensor, which synchronizes with the device
            k = int(_Frame(self, s, 0, 1).words(carried[:, :1].detach(), 1))
            trains, k = k >= 0, max(k, ~k)
        gates, plans = self.has_gates[step], self.plan_sizes[step]
        frame = _Frame(self, s, k, self.states if is_between else 1)
        count = gates + plans + self.num_notes
        full, rows, position, *words = _Unpack.apply(frame, count, carried)
        position, is_padding = position.long(), None
        if self.has_documents or (self.shares is None and step > 0):
            is_padding = position < 0
            position = torch.where(is_padding, ~position, position)
        decision = RoutingDecision(
            sequence.take(position, is_padding),
            rows=None if is_padding is None and k == s else position,
            gates=words[0] if gates else None,
            plan=torch.stack(words[gates : gates + plans], dim=-1) if plans else None,
        )
        notes = torch.stack(words[gates + plans :], dim=-1) if self.num_notes else None
        return CarriedState(full, rows, decision, notes, trains)


def _document_words(sequence: Tokens) -> Tensor:
    """The document of each token of the sequence, `[s b]`; its complement at padding."""
    documents = sequence.documents
    words = torch.zeros_like(sequence.positions) if documents is None else documents
    if sequence.is_padding is not None:
        words = torch.where(sequence.is_padding, ~words, words)
    return words.int()


@dataclass(frozen=True)
class _Frame:
    """The layout of one tensor, for a sequence of `s` tokens of which `k` run the step.

    Its bits are: `k`, or its complement if gradients do not go through the step, the document of each
    token of the sequence if documents are sent, and for each of the `k` tokens a position and `count`
    further numbers.
    """

    layout: CarriedLayout
    s: int
    k: int
    states: int
    """Rows that a token in the block takes."""
    trains: bool = True
    """Whether gradients go through the step."""

    def join(self, full: Tensor, rows: Tensor, words: Sequence[Tensor]) -> Tensor:
        layout = self.layout
        batch = full.shape[1]
        full, rows = self._as_rows(full, layout.states), self._as_rows(rows, self.states)
        first = self.k if self.trains else ~self.k
        header = torch.full((1, batch), first, dtype=torch.int32, device=full.device)
        # [1 b], [k b], ... -> [b words] -> [b elements] -> [b rows h] -> [rows b h]
        bits = torch.cat([header, *(word.view(torch.int32) for word in words)]).T.contiguous()
        bits = bits.view(full.dtype)
        size = layout.bit_rows(self.s) * layout.hidden_size
        bits = F.pad(bits, (0, size - bits.shape[1])).unflatten(1, (-1, layout.hidden_size))
        bits = bits.transpose(0, 1)
        spare = layout.carried_length(self.s) // layout.ranks - len(full) - len(rows) - len(bits)
        return torch.cat([full, F.pad(rows, (0, 0, 0, 0, 0, spare)), bits])

    def split(self, carried: Tensor, count: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What all tokens carry, the rows, and the words of the tokens that run the step."""
        layout = self.layout
        end = self.s // layout.ranks * layout.states
        rows = carried[end : end + layout.shard(self.k) * self.states]
        first = 1 + self.s * layout.has_documents
        words = self.words(carried, first + count * self.k)[first:]
        full, rows = (
            self._of_tokens(carried[:end], layout.states),
            self._of_tokens(rows, self.states),
        )
        return full, rows, list(words.split(self.k)) if count else []

    def words(self, carried: Tensor, count: int) -> Tensor:
        """The first `count` of the bits, as int32: `[count b]`."""
        layout = self.layout
        bits = carried[len(carried) - layout.bit_rows(self.s) :].transpose(0, 1).flatten(1)
        elements = count * WORD_BYTES // layout.itemsize
        return bits[:, :elements].contiguous().view(torch.int32).T.contiguous()

    def _as_rows(self, states: Tensor, count: int) -> Tensor:
        """`[t b nh] -> [tn b h]`."""
        if count == 1:
            return states
        return states.unflatten(-1, (count, -1)).transpose(1, 2).flatten(0, 1)

    def _of_tokens(self, rows: Tensor, count: int) -> Tensor:
        """`[tn b h] -> [t b nh]`."""
        if count == 1:
            return rows
        return rows.unflatten(0, (-1, count)).transpose(1, 2).flatten(2)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frame: _Frame, full: Tensor, rows: Tensor, *words: Tensor) -> Tensor:
        ctx.frame = frame
        ctx.is_float = [word.is_floating_point() for word in words]
        return frame.join(full, rows, words)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        has_documents = ctx.frame.layout.has_documents
        full, rows, words = ctx.frame.split(gradients[0], len(ctx.is_float) - has_documents)
        floats = [
            word.view(torch.float32) if is_float else None
            for word, is_float in zip(words, ctx.is_float[has_documents:], strict=True)
        ]
        return None, full, rows, *[None] * has_documents, *floats


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frame: _Frame, count: int, carried: Tensor) -> Any:
        full, rows, (position, *words) = frame.split(carried, 1 + count)
        floats = [word.view(torch.float32) for word in words]
        ctx.frame = frame
        ctx.like = (full.shape, rows.shape, carried.dtype, carried.device)
        ctx.mark_non_differentiable(position)
        ctx.set_materialize_grads(False)
        return full, rows, position, *floats

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, full: Tensor | None, rows: Tensor | None, *words: Any
    ) -> Any:
        full_shape, rows_shape, dtype, device = ctx.like
        full = torch.zeros(full_shape, dtype=dtype, device=device) if full is None else full
        rows = torch.zeros(rows_shape, dtype=dtype, device=device) if rows is None else rows
        none = torch.zeros(ctx.frame.k, full.shape[1], device=device)
        parts = [none if word is None else word.contiguous() for word in words]
        if ctx.frame.layout.has_documents:
            parts.insert(0, torch.zeros(ctx.frame.s, full.shape[1], device=device))
        return None, None, ctx.frame.join(full, rows, parts)


class GradientsOfLaterSteps(torch.autograd.Function):
    """Identity on hidden states whose backward pass adds the gradients from later steps.

    Later steps use tensors of earlier ones on the same rank, but each step has its own autograd graph.
    Their graphs contain leaves in place of these tensors. When the backward pass of a step begins, the
    gradients of its leaves are complete, because the backward passes of the steps run in reverse order.
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

    tokens: Tokens
    """The tokens of the whole sequence."""
    contexts: dict[int, StepContext] = field(default_factory=dict)
    """The context of each step so far, with leaves in place of the keys and values it has computed."""
    origin: Tensor | None = None
    """What tokens carried into the recursion, as a leaf. None if no later step needs it."""
    states: list[Tensor] = field(default_factory=list)
    """The states of all tokens after each step so far, as leaves, for a loss after every loop. Only on
    the rank that has them."""
    leaves: dict[int, list[Tensor]] = field(default_factory=dict)
    """The leaves that replace tensors of each step in the graphs of later steps."""
    decisions: list[RoutingDecision] = field(default_factory=list)
    """The decisions of the steps so far. Only on the rank that routes."""
