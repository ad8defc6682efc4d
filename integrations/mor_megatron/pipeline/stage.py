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

from mor_layers import RecursionConfig, RecursionOutput, RoutingDecision
from mor_layers.profiling import named_range
from mor_layers.recursion import SharingContext, begin_step
from mor_megatron.layers import BlockPart, RecursionLayer, RecursionSubmodules, refuse_inputs
from mor_megatron.pipeline.state import CarriedLayout, CarriedState, Flight, GradientsOfLaterSteps
from mor_megatron.step import StepRotation, packed_documents


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

    The first rank holds the whole router, because every step begins there. The last rank combines
    the output with the states of the tokens, so the router's `combine` must not have parameters.

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
        self.layout = CarriedLayout.of(
            recursion,
            config.hidden_size,
            config.pipeline_dtype.itemsize,
            self.tp_group.size() if config.sequence_parallel else 1,
            documents,
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
            self.flights[microbatch] = Flight()
        flight, is_last = self.flights[microbatch], step == self.num_recursions - 1
        if (is_again and step == 0) if recomputes else is_last:
            del self.flights[microbatch]  # autograd keeps what the backward pass needs
        with named_range(f"mor/step {step + 1}"):
            if not self.is_entry:
                state = self.layout.unpack(hidden, step)
            else:
                masks = (attention_mask, padding_mask, packed_seq_params)
                state = self._arrive(step, hidden, *masks)
                state = self._route(step, state, flight, is_again)
            length, packed = state.decision.tokens.sequence_length, None
            if packed_seq_params is not None:
                packed = packed_documents(packed_seq_params, length)
            rotation = self._rotation(rotary_pos_emb, state.rows, length, packed)
            state = self._run_layers(step, state, flight, rotation)
        if is_last and self.is_exit:
            return make_viewless_tensor(state.full, state.full.requires_grad, keep_graph=True)
        return self.layout.pack(state, step)

    def _arrive(
        self,
        step: int,
        hidden: Tensor,
        attention_mask: Tensor | None,
        padding_mask: Tensor | None,
        packed_seq_params: Any,
    ) -> CarriedState:
        """The candidates of a step, from the model's input or from the last rank's tensor."""
        if step > 0:
            return self.layout.unpack(hidden, step - 1)
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
        return CarriedState(hidden, hidden, RoutingDecision.everything(tokens))

    def _route(
        self, step: int, state: CarriedState, flight: Flight, is_again: bool
    ) -> CarriedState:
        previous = replace(state.decision, rows=None)
        decision = self.recursion.route(state.rows, step, previous, self.causal_routing)
        selected = self.recursion.select(state.rows, decision)
        if step == 0:
            flight.tokens = previous.tokens
        if not is_again:
            flight.decisions.append(decision)
            if step == self.num_recursions - 1:
                output = RecursionOutput(state.full, tuple(flight.decisions))
                self.statistics.record(cast(Any, flight.tokens), output)
        # Attaching losses reads the number of tokens from the first decision and sums the losses of
        # all decisions. The losses of step 1 are already attached, so they are left out here.
        first = replace(flight.decisions[0], losses={})
        decisions = (first, decision) if step else (decision,)
        selected = self._attach_losses(RecursionOutput(selected, decisions))
        return CarriedState(state.full, selected, decision)

    def _run_layers(
        self, step: int, state: CarriedState, flight: Flight, rotation: StepRotation | None
    ) -> CarriedState:
        recursion, decision = self.recursion, state.decision
        earlier = flight.context if step else None
        context = begin_step(recursion.kv_policy, step, decision.tokens, earlier)
        rows = recursion.enter(step, state.rows, self._injected(step, state, flight))
        output = recursion.run_layers(rows, context, rotation=rotation)
        origin = state.full if self.keeps_origin else None
        if step == 0:
            output = self._leave_for_later(output, flight, context, origin)
        else:
            flight.context, origin = context, flight.origin
        if not self.is_exit:
            return replace(state, rows=output)
        selected = recursion.select(state.full, decision)
        origin = selected if origin is None else recursion.select(origin, decision)
        updated = recursion.combine(step, selected, output, decision, origin)
        full = recursion.placement.write_back(state.full, updated, decision)
        return CarriedState(full, updated, decision)

    def _injected(self, step: int, state: CarriedState, flight: Flight) -> Tensor | None:
        """The states that entered the recursion, for the rows of a step whose input adds them."""
        if step == 0 or flight.origin is None or not self.is_entry:
            return None
        tokens = state.decision.tokens
        is_all = tokens.is_padding is None and len(tokens.positions) == tokens.sequence_length
        among_all = replace(state.decision, rows=None if is_all else tokens.positions)
        return self.recursion.select(flight.origin, among_all)

    def _leave_for_later(
        self, output: Tensor, flight: Flight, context: Any, origin: Tensor | None
    ) -> Tensor:
        """Keep the tensors of step 1 that later steps use on this rank.

        The backward pass of the returned output adds the gradients of these uses.
        """
        store = context.store if isinstance(context, SharingContext) else {}
        originals = [tensor for layer in sorted(store) for tensor in store[layer]]
        originals += [] if origin is None else [origin]
        if not flight.leaves:  # if there are leaves already, this is the recomputation
            flight.leaves = [tensor.detach().requires_grad_() for tensor in originals]
            leaves = iter(flight.leaves)
            flight.context = context
            if store:
                kept = {layer: (next(leaves), next(leaves)) for layer in sorted(store)}
                flight.context = replace(context, store=kept)
            flight.origin = next(leaves, None)
        if not (originals and torch.is_grad_enabled()):
            return output
        return GradientsOfLaterSteps.apply(output, flight.leaves, *originals)  # type: ignore[return-value]

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
            parts["router."] = "router.", self.recursion.router
            if self.recursion.step_input is not None:
                parts["step_input."] = "step_input.", self.recursion.step_input
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
