"""One rank's part of a recursion whose block is spread over the pipeline: see `pipeline`.

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
from mor_layers.recursion import SharingContext, begin_step
from mor_megatron.layers import BlockPart, RecursionLayer, RecursionSubmodules, refuse_inputs
from mor_megatron.pipeline.state import CarriedLayout, CarriedState, Flight, GradientsOfLaterSteps


class Turns:
    """Which microbatch a chunk runs when recomputation runs it once more in the backward pass."""

    def __init__(self) -> None:
        self._to_repeat: deque[int] = deque()

    def next(self, microbatch: int) -> tuple[int, bool]:
        """The microbatch to run, `microbatch` if it is a new one, and whether it ran before."""
        if torch.is_grad_enabled():  # backward passes come in the order of the forward ones
            return self._to_repeat.popleft(), True
        if microbatch == 0:
            self._to_repeat.clear()
        self._to_repeat.append(microbatch)
        return microbatch, False


class RecursionStage(RecursionLayer):
    """A rank's part of the recursion block. It runs step 1; `RepeatedStage`s run the others on it.

    The first rank holds the router, all of it: every step begins there. The last one combines; a
    router must do that without parameters.

    Args:
        submodules: specs of this rank's layers.
        block_size: layers of the whole block (K).
        first_in_block: layers of the block on earlier ranks.
        documents: whether batches may have several documents in a sequence, or padding.

    Others as for `RecursionLayer`.
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
        self.announced_lengths: set[int] = set()  # the schedule counts what travels with them
        self.flights: dict[int, Flight] = {}
        self.turns = Turns()
        self.current_microbatch = 0  # the schedule sets it before each forward pass

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, context: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`[s b h]` on the first rank, on others what travels, to what travels."""
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
        """This rank's part of a step on what arrived. Returns what leaves.

        Raises:
            ValueError: an input the recursion does not implement.
        """
        refuse_inputs(
            packed_seq_params=packed_seq_params,
            inference_context=inference_context,
            attention_bias=attention_bias,
        )
        recomputes, is_again = self.training and self.config.recompute_granularity == "full", False
        if recomputes:
            microbatch, is_again = turns.next(microbatch)
        if step == 0 and not is_again:
            self.flights[microbatch] = Flight()
        flight, is_last = self.flights[microbatch], step == self.num_recursions - 1
        if (is_again and step == 0) if recomputes else is_last:
            del self.flights[microbatch]  # what the backward pass needs, its graphs hold
        if not self.is_entry:
            state = self.layout.unpack(hidden, step)
        else:
            state = self._arrive(step, hidden, attention_mask, padding_mask)
            state = self._route(step, state, flight, is_again)
        state = self._run_layers(step, state, flight, rotary_pos_emb)
        if is_last and self.is_exit:
            return make_viewless_tensor(state.full, state.full.requires_grad, keep_graph=True)
        return self.layout.pack(state, step)

    def _arrive(
        self, step: int, hidden: Tensor, attention_mask: Tensor | None, padding_mask: Tensor | None
    ) -> CarriedState:
        """The candidates of a step."""
        if step > 0:
            return self.layout.unpack(hidden, step - 1)
        tokens, _ = self._tokens(hidden, attention_mask, padding_mask)
        length = tokens.sequence_length
        if self.layout.carried_length(length) != length and length not in self.announced_lengths:
            raise ValueError(
                f"the schedule has no room for what travels with sequences of {length}. Run it "
                f"through recursion_forward_backward, or give it seq_length=carried_length(chunks, "
                f"{length})."
            )
        if not (tokens.is_plain or self.layout.has_documents):
            raise ValueError(
                "the batch has several documents in a sequence, or padding, for which nothing "
                "travels between stages. Give documents=True to recursion_pipeline_spec."
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
        # The loss may count the tokens of the first decision, and adds up those of all.
        first = replace(flight.decisions[0], losses={})
        decisions = (first, decision) if step else (decision,)
        selected = self._attach_losses(RecursionOutput(selected, decisions))
        return CarriedState(state.full, selected, decision)

    def _run_layers(
        self, step: int, state: CarriedState, flight: Flight, rotary_pos_emb: Tensor | None
    ) -> CarriedState:
        recursion, decision = self.recursion, state.decision
        earlier = flight.context if step else None
        context = begin_step(recursion.kv_policy, step, decision.tokens, earlier)
        rotation = self._rotation(rotary_pos_emb, state.rows)
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
        """Where the recursion began, for the rows of a step that add it."""
        if step == 0 or flight.origin is None or not self.is_entry:
            return None
        tokens = state.decision.tokens
        is_all = tokens.is_padding is None and len(tokens.positions) == tokens.sequence_length
        among_all = replace(state.decision, rows=None if is_all else tokens.positions)
        return self.recursion.select(flight.origin, among_all)

    def _leave_for_later(
        self, output: Tensor, flight: Flight, context: Any, origin: Tensor | None
    ) -> Tensor:
        """Keep what later steps need of step 1; their gradients come back through the output."""
        store = context.store if isinstance(context, SharingContext) else {}
        originals = [tensor for layer in sorted(store) for tensor in store[layer]]
        originals += [] if origin is None else [origin]
        if not flight.leaves:  # else they are there, and this is the recomputation
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
        """The keys of a `RecursionLayer` that holds the whole block, as far as they are here."""
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
    """A later step of a `RecursionStage`, whose modules it uses without registering them."""

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
        # Not TransformerLayer's: that would build a layer's parts.
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
        """Run on the modules of this stage, from now on."""
        self._first = [first]  # in a list, torch does not register it

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, context: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """What travels, to what travels; after the last step on the last rank `[s b h]`.

        Raises:
            ValueError: the stage was not connected, or an input that is not implemented.
        """
        if not self._first:
            raise ValueError(
                f"chunk {self.step} has no layers of its own and was not connected to the first. "
                "Call connect_stages(chunks) when all chunks of this rank are built."
            )
        (first,), microbatch = self._first, self.current_microbatch
        return first.run(self.step, microbatch, self.turns, hidden_states, **inputs), context

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing: the first chunk has it."""
        return {}
