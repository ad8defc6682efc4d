"""One rank's part of a recursion whose block is distributed over the pipeline, see `spec`.

Legend: `s` sequence, `b` batch, `h` hidden, `k` tokens that run a step.
"""

from collections import deque
from dataclasses import replace
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import GraphableMegatronModule
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import get_pg_rank, make_viewless_tensor
from torch import Tensor

from mor_layers import RecursionConfig, RecursionOutput, RoutingDecision, Tokens
from mor_layers.profiling import named_range
from mor_layers.recursion import Exited, ExitStateContext, SharingContext, begin_step
from mor_layers.recursion.truncation import cut
from mor_megatron.layers import BlockPart, RecursionLayer, RecursionSubmodules, refuse_inputs
from mor_megatron.pipeline.state import CarriedLayout, CarriedState, Flight, GradientsOfLaterSteps
from mor_megatron.step import (
    PackedDocuments,
    StepRotation,
    in_sequence_order,
    packed_documents,
    zigzag_positions,
)


class Turns:
    """Tells a chunk which microbatch it runs when the backward pass recomputes it.

    The schedule only announces the microbatch before forward passes.
    """

    def __init__(self) -> None:
        self._to_repeat: deque[int] = deque()

    def next(self, microbatch: int) -> tuple[int, bool]:
        """The microbatch to run, and whether this is a recomputation.

        Args:
            microbatch: the one that the schedule announced, used if this is not a recomputation.
        """
        if torch.is_grad_enabled():  # backward passes have the order of the forward passes
            return self._to_repeat.popleft(), True
        if microbatch == 0:
            self._to_repeat.clear()
        self._to_repeat.append(microbatch)
        return microbatch, False


class RecursionStage(RecursionLayer):
    """A rank's part of the recursion block. It runs step 1, and each `RepeatedStage` a later step.

    The first rank holds the whole router and the parameters of the loop state, because every step
    begins there. The last rank combines the output with the states of the tokens, so the router's
    `combine` must not have parameters; those of the loop state reach it as notes.

    Args:
        submodules: specs of this rank's layers.
        block_size: number of layers of the whole block (K).
        first_in_block: number of layers of the block on earlier ranks.
        documents: whether batches may have several documents in a sequence, or padding.

    The other arguments are those of `RecursionLayer`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: RecursionSubmodules,
        layer_number: int = 1,
        *,
        recursion: RecursionConfig,
        block_size: int,
        first_in_block: int,
        documents: bool,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        **unused: Any,
    ) -> None:
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(
            config,
            submodules,
            layer_number,
            recursion=recursion,
            part=BlockPart(block_size, first_in_block, routes=pg_collection.pp.rank() == 0),
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.first_in_block = first_in_block
        self.num_recursions = recursion.num_recursions
        self.is_exit = pg_collection.pp.rank() == pg_collection.pp.size() - 1
        injects = self.recursion.step_input is not None and self.recursion.step_input.injects
        combines = self.is_exit and self.recursion.router.combines_with_origin
        self.keeps_origin = injects or combines
        self.reads_every_loop = self.is_exit and recursion.loop_loss is not None
        self.layout = CarriedLayout.of(
            recursion,
            config.hidden_size,
            config.pipeline_dtype.itemsize,
            (self.tp_group.size() if config.sequence_parallel else 1)
            * config.context_parallel_size,
            documents,
            config.context_parallel_size,
        )
        self.announced_lengths: set[int] = set()  # lengths that `carried_length` was called with
        self.flights: dict[int, Flight] = {}
        self.turns = Turns()
        self.current_microbatch = 0  # the schedule sets it before each forward pass

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, context: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run step 1. The input is `[s b h]` on the first rank, and a packed tensor on the others.

        The output is a packed tensor, see `state`.
        """
        return self.run(0, self.current_microbatch, self.turns, hidden_states, **inputs), context

    def run(
        self,
        step: int,
        microbatch: int,
        turns: Turns,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        padding_mask: Tensor | None = None,
        packed_seq_params: Any = None,
        inference_context: Any = None,
        attention_bias: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Run this rank's part of a step on the received tensor. Returns the tensor to send.

        Raises:
            ValueError: an input is not supported by the recursion.
        """
        refuse_inputs(inference_context=inference_context, attention_bias=attention_bias)
        recomputes, is_again = self.training and self.config.recompute_granularity == "full", False
        if recomputes:
            microbatch, is_again = turns.next(microbatch)
        if step == 0 and not is_again:
            masks = (attention_mask, padding_mask, packed_seq_params)
            self.flights[microbatch] = Flight(self._sequence(hidden, *masks))
        flight, is_last = self.flights[microbatch], step == self.num_recursions - 1
        if (is_again and step == 0) if recomputes else is_last:
            del self.flights[microbatch]  # autograd keeps what the backward pass needs
        for router in self.expert_routers:
            router.batch_size = flight.tokens.count
        length, packed = flight.tokens.sequence_length, None
        if packed_seq_params is not None:
            packed = packed_documents(packed_seq_params, length)
        with named_range(f"mor/step {step + 1}"):
            if self.is_entry:
                arrived = self._arrive(step, hidden, flight, packed)
            else:
                arrived = self.layout.unpack(hidden, step, flight.tokens)
            with torch.set_grad_enabled(torch.is_grad_enabled() and arrived.trains):
                state = arrived
                if self.is_entry:
                    state = self._enter(step, self._route(step, state, flight, is_again), flight)
                rotation = self._rotation(rotary_pos_emb, state.rows, length, packed)
                state = self._run_layers(step, state, flight, rotation)
                if is_last and self.is_exit:
                    return self._leave(state.full, flight, packed)
                carried = self.layout.pack(state, step, flight.tokens)
        return carried if arrived.trains else self._cut(carried, hidden, step, arrived, flight)

    def _sequence(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        padding_mask: Tensor | None,
        packed_seq_params: Any,
    ) -> Tokens:
        """The tokens of the whole sequence, from the model's input or from the first rank's tensor."""
        if not self.is_entry:
            return self.layout.sequence(hidden)
        packed = self.inputs.packed(hidden, attention_mask, packed_seq_params)
        tokens, _ = self.inputs.tokens(hidden, attention_mask, padding_mask, packed)
        length = tokens.sequence_length
        if self.layout.carried_length(length) != length and length not in self.announced_lengths:
            raise ValueError(
                f"the schedule's tensors have no room for the routing data of sequences of {length} "
                f"tokens. Call recursion_forward_backward, or pass "
                f"seq_length=carried_length(chunks, {length}) to the schedule."
            )
        if not (tokens.is_plain or self.layout.has_documents):
            raise ValueError(
                "the batch has padding or several documents in a sequence, but stages do not send "
                "data about these. Pass documents=True to recursion_pipeline_spec."
            )
        return tokens

    def _arrive(
        self, step: int, hidden: Tensor, flight: Flight, packed: PackedDocuments | None
    ) -> CarriedState:
        """The candidates of a step, from the model's input or from the last rank's tensor."""
        first_trained = self.recursion.router.first_trained_step
        if step > 0:
            arrived = self.layout.unpack(hidden, step - 1, flight.tokens, is_between=True)
            return replace(arrived, trains=step >= first_trained)
        relayout = self.inputs.relayout(flight.tokens.sequence_length, packed, hidden.device)
        hidden = hidden if relayout is None else relayout.to_sequence(hidden)
        hidden = self.recursion.begin(hidden)
        decision = RoutingDecision.everything(flight.tokens)
        return CarriedState(hidden, hidden, decision, trains=step >= first_trained)

    def _route(
        self, step: int, state: CarriedState, flight: Flight, is_again: bool
    ) -> CarriedState:
        previous = replace(state.decision, rows=None)
        decision = self.recursion.route(state.rows, step, previous, self.causal_routing)
        selected = self.recursion.select(state.rows, decision)
        if not is_again:
            flight.decisions.append(decision)
            if step == self.num_recursions - 1:
                output = RecursionOutput(state.full, tuple(flight.decisions))
                self.statistics.record(flight.tokens, output)
        # Attaching losses reads the number of tokens from the first decision and sums the losses of
        # all decisions. The losses of step 1 are already attached, so they are left out here.
        first = replace(flight.decisions[0], losses={})
        decisions = (first, decision) if step else (decision,)
        selected = self._attach_losses(RecursionOutput(selected, decisions))
        return CarriedState(state.full, selected, decision, trains=state.trains)

    def _enter(self, step: int, state: CarriedState, flight: Flight) -> CarriedState:
        """What enters the first layer, and what the last rank must know of the loop state."""
        recursion, notes = self.recursion, None
        if recursion.loop_state is not None:
            notes = recursion.loop_state.notes(step, state.rows)
        if notes is not None:
            notes = recursion.placement.gather(notes, len(state.decision.tokens.positions))
        rows = recursion.enter(step, state.rows, self._injected(step, state, flight))
        return replace(state, rows=rows, notes=notes)

    def _run_layers(
        self, step: int, state: CarriedState, flight: Flight, rotation: StepRotation | None
    ) -> CarriedState:
        recursion, decision = self.recursion, state.decision
        earlier = flight.contexts[step - 1] if step else None
        if isinstance(earlier, SharingContext | ExitStateContext):  # a step adds to its own copy
            earlier = replace(earlier, store=dict(earlier.store))
        exited = self._exited(step, state, flight)
        context = begin_step(recursion.kv_policy, step, decision.tokens, earlier, exited)
        output = recursion.run_layers(state.rows, context, rotation=rotation)
        kept = [state.full] if self.keeps_origin and step == 0 else []
        if self.is_exit:
            selected = recursion.select(state.full, decision)
            origin = state.full if step == 0 else flight.origin
            if self.keeps_origin:
                assert origin is not None
                origin = recursion.select(origin, decision)
            else:
                origin = selected
            notes = state.notes
            if notes is not None:  # spread over ranks as a plan would be
                notes = recursion.placement.shard(decision.with_plan(notes)).plan
            output = recursion.combine(step, selected, output, decision, origin, notes)
            full = recursion.placement.write_back(state.full, output, decision)
            state = replace(state, full=full, rows=output)
            if self.reads_every_loop and self.training and step < self.num_recursions - 1:
                kept.append(recursion.end(full))
        output = self._leave_for_later(step, output, flight, context, kept)
        return replace(state, rows=output)

    def _exited(self, step: int, state: CarriedState, flight: Flight) -> Exited | None:
        """The tokens that ran the step before and not this one, which have their final states."""
        tokens = state.decision.tokens
        before = flight.contexts[step - 1].tokens if step else flight.tokens
        if self.recursion.kv_policy != "exit_state":
            return None
        is_ragged = tokens.is_padding is not None or before.is_padding is not None
        if tokens.shape == before.shape and not is_ragged:
            return None
        taken = replace(state.decision, rows=before.rows_of(tokens))
        rest = RoutingDecision(before).rest(taken)
        if rest is None:
            return None
        in_full = replace(rest, rows=rest.tokens.positions)
        return Exited(rest.tokens, self.recursion.end(self.recursion.select(state.full, in_full)))

    def _injected(self, step: int, state: CarriedState, flight: Flight) -> Tensor | None:
        """What entered the recursion, for the rows of a step whose input adds it."""
        if step == 0 or flight.origin is None:
            return None
        tokens = state.decision.tokens
        is_all = tokens.is_padding is None and len(tokens.positions) == tokens.sequence_length
        among_all = replace(state.decision, rows=None if is_all else tokens.positions)
        return self.recursion.select(flight.origin, among_all)

    def _cut(
        self, carried: Tensor, hidden: Tensor, step: int, arrived: CarriedState, flight: Flight
    ) -> Tensor:
        """The tensor to send after a step that does not train.

        The schedule and data parallelism wait for gradients of what was received and of the layers, and
        get zeros. Only what entered the recursion, which later steps inject, has learned something.
        """
        carried = cut(carried, self.recursion, hidden)
        if not (step == 0 and self.is_entry and self.keeps_origin and torch.is_grad_enabled()):
            return carried
        assert flight.origin is not None
        return GradientsOfLaterSteps.apply(carried, [flight.origin], arrived.full)  # type: ignore[return-value]

    def _leave_for_later(
        self, step: int, output: Tensor, flight: Flight, context: Any, kept: list[Tensor]
    ) -> Tensor:
        """Keep the tensors of a step that later steps use on this rank.

        The backward pass of the returned output adds the gradients of these uses.

        Args:
            kept: tensors beside the keys and values that the step has computed: what tokens carried into
                the recursion, at step 1, and the states of all tokens after the step.
        """
        store = context.store if isinstance(context, SharingContext | ExitStateContext) else {}
        known = flight.contexts[step - 1].store if store and step else {}  # type: ignore[attr-defined]
        new = sorted(store.keys() - known.keys())
        originals = [tensor for layer in new for tensor in store[layer]] + kept
        if step not in flight.leaves:  # otherwise, this is the recomputation
            flight.leaves[step] = [tensor.detach().requires_grad_() for tensor in originals]
            leaves = iter(flight.leaves[step])
            flight.contexts[step] = context
            if store:
                pairs = {layer: (next(leaves), next(leaves)) for layer in new}
                flight.contexts[step] = replace(context, store=known | pairs)
            if self.keeps_origin and step == 0:
                flight.origin = next(leaves)
            flight.states += leaves
        if not (originals and torch.is_grad_enabled()):
            return output
        return GradientsOfLaterSteps.apply(output, flight.leaves[step], *originals)  # type: ignore[return-value]

    def cut_table(self, table: Tensor, length: int, is_packed: bool) -> Tensor:
        """The rows of a rotary table that Megatron's layers need for a sequence of `length` tokens.

        Args:
            table: this rank's rows of a table that is longer. For a packed sequence, all of its rows.
        """
        if is_packed or self.config.context_parallel_size == 1:
            return table[:length]
        group = self.pg_collection.cp
        own = zigzag_positions(length, group.size(), table.device)[group.rank()]
        return in_sequence_order(table, group).index_select(0, own)

    def _leave(self, full: Tensor, flight: Flight, packed: PackedDocuments | None) -> Tensor:
        """The output of the recursion, in the layout of Megatron's layers."""
        hidden = self.recursion.end(full)
        if flight.states and self._returns_every_loop():
            hidden = self._all_loops(hidden, (*flight.states, hidden), flight.tokens)
        relayout = self.inputs.relayout(flight.tokens.sequence_length, packed, hidden.device)
        hidden = hidden if relayout is None else relayout.to_zigzag(hidden)
        hidden = hidden.contiguous()  # a history ends in a slice
        return make_viewless_tensor(hidden, hidden.requires_grad, keep_graph=True)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """This rank's part, under the keys of a `RecursionLayer` that holds the whole block."""
        assert not sharded_offsets, "layers of a recursion have keys of their own"
        parts: dict[str, tuple[str, Any]] = {}
        for index, layer in enumerate(cast(Any, self.recursion.layers)):
            parts[f"layers.{index}."] = f"layers.{self.first_in_block + index}.", layer
        if self.is_entry:
            parts |= {name: (name, part) for name, part in self._parts_beside_layers().items()}
        state: dict[str, Any] = {}
        for here, (name, module) in parts.items():
            here, name = f"{prefix}recursion.{here}", f"{prefix}recursion.{name}"
            part = sharded_state_dict_default(module, here, (), metadata, tp_group=self.tp_group)
            replace_prefix_for_sharding(part, here, name)
            state |= part
        return state


class RepeatedStage(TransformerLayer):
    """A later step of a `RecursionStage`. It uses the stage's modules without registering them."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: None = None,
        layer_number: int = 1,
        *,
        step: int,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        **unused: Any,
    ) -> None:
        # Skip the __init__ of TransformerLayer, which would build the parts of a layer.
        GraphableMegatronModule.__init__(self, config=config, vp_stage=vp_stage)
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.pg_collection = pg_collection
        self.tp_group = pg_collection.tp
        self.is_mtp_layer = self.is_moe_layer = False
        self.submodules_config = submodules
        self.layer_number = layer_number + get_transformer_layer_offset(
            config, vp_stage, get_pg_rank(pg_collection.pp)
        )
        self.step = step
        self.turns = Turns()
        self.current_microbatch = 0  # the schedule sets it before each forward pass
        self._first: list[RecursionStage] = []

    def use(self, first: RecursionStage) -> None:
        """Use the modules of this stage from now on."""
        self._first = [first]  # in a list, so that torch does not register it as a submodule

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, context: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run a later step on a packed tensor. The last step returns `[s b h]` on the last rank.

        Raises:
            ValueError: the stage was not connected, or an input is not supported.
        """
        if not self._first:
            raise ValueError(
                f"chunk {self.step} has no layers of its own and was not connected to the first "
                "chunk. Call connect_stages(chunks) after building all chunks of this rank."
            )
        (first,), microbatch = self._first, self.current_microbatch
        return first.run(self.step, microbatch, self.turns, hidden_states, **inputs), context

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Empty, because the first chunk saves the weights."""
        return {}
