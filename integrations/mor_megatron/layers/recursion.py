"""RecursionLayer: a whole Mixture-of-Recursions as one layer of an unmodified GPTModel.

Legend: `s` sequence, `b` batch, `h` hidden, `r` rotary size; under sequence parallelism a rank
holds `s / tp` rows.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import GraphableMegatronModule
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import get_pg_rank, make_viewless_tensor
from torch import Tensor, nn

from mor_layers import RecursionBlock, RecursionConfig, RecursionOutput, RoutingDecision, Tokens
from mor_layers.recursion import over_loops
from mor_layers.routers import LoopState
from mor_megatron.layers.block_part import BlockPart, CombiningRouter, UpdatingLoopState
from mor_megatron.layers.experts.router import StepTopKRouter
from mor_megatron.layers.graphs import (
    is_graphed,
    require_equal_sequences,
    require_whole_block,
)
from mor_megatron.layers.quantization import require_one_precision
from mor_megatron.layers.routing.auxiliary_loss import RouterLossScaler, listen_for_loss_scale
from mor_megatron.layers.routing.counts import RoutingStatistics
from mor_megatron.layers.sequence_inputs import SequenceInputs, refuse_inputs
from mor_megatron.layers.stack import StepStack
from mor_megatron.layers.sublayers.per_step import attentions_of
from mor_megatron.layers.validation import (
    require_room_for_all_loops,
    require_static_generation,
    validate,
)
from mor_megatron.step import (
    PackedDocuments,
    StaticCache,
    StepRotation,
)


@dataclass
class RecursionSubmodules:
    """The specs from which a RecursionLayer builds its layers."""

    layer_specs: Sequence[ModuleSpec]
    """The K layers of the shared block in order, as ordinary Megatron layer specs."""


class _Recursion(RecursionBlock):
    """A RecursionBlock whose routers draw the same random numbers on all tensor-parallel ranks."""

    def route(
        self,
        candidates: Tensor,
        step: int,
        previous: RoutingDecision,
        causal: bool = False,
        assess: bool = True,
    ) -> RoutingDecision:
        if not self.router.draws:
            return super().route(candidates, step, previous, causal, assess)
        tracker = get_cuda_rng_tracker()
        name = get_data_parallel_rng_tracker_name()
        with tracker.fork(name) if name in tracker.get_states() else nullcontext():
            return super().route(candidates, step, previous, causal, assess)


class RecursionLayer(TransformerLayer):
    """A recursion block in the place of a TransformerLayer.

    The K layers are built once from ordinary Megatron layer specs and run `num_recursions` times;
    their weights are tied because there is only one copy. Put it into a
    `TransformerBlockSubmodules` next to ordinary layers, once or several times (see
    `recursion_layer_spec` and `recursion_block_spec`).

    Args:
        config: the model's configuration. The constructor changes two of its fields:
            `hetereogenous_dist_checkpoint`, because the layers differ in their checkpoint keys, and
            the function through which the schedules announce the loss scale, which the routers'
            losses need.
        submodules: specs of the shared layers.
        layer_number: 1-based index among the layers of this pipeline stage.
        recursion: steps, router, KV policy and norms. `sharing` is not used, because every step
            runs all K layers.
        part: the layers of the block that are on this rank, if the block is spread over the
            pipeline. By default the rank holds the whole block.

    Raises:
        ValueError: the settings cannot run in a recursion (see `validation`).
    """

    is_entry: bool
    """Whether tokens are routed here: False on later stages of a block spread over the pipeline."""
    causal_routing = False
    """Whether no token's depth may depend on later tokens, as generation requires (see
    `training.causal_routing`)."""
    compiled: tuple[Any, ...] = ()
    """The compiled recursion, if `training.compile_recursions` was called. In a tuple, because modules
    register attributes that are modules, and its weights are those of `recursion`."""
    read_out: tuple[tuple[Tensor, ...], Tokens] | None = None
    """What the last forward pass of training returned of every loop, detached, and its tokens: for a
    router that learns exits, from when the states have been read out until `teach`."""
    returns_every_loop: bool | None = None
    """Whether to return the states after all loops as one batch (`mor_layers.recursion.over_loops`).
    `training.weigh_loops` sets it before each forward pass; None: it was not called."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: RecursionSubmodules,
        layer_number: int = 1,
        *,
        recursion: RecursionConfig,
        part: BlockPart | None = None,
        keeps_together: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        **unused: Any,
    ) -> None:
        validate(config, recursion, keeps_together)
        require_whole_block(config, is_whole=part is None)
        if part is None and recursion.loop_loss is not None:
            require_room_for_all_loops(config)
        config.hetereogenous_dist_checkpoint = True
        listen_for_loss_scale(config)
        # Not TransformerLayer.__init__, which would build the parts of a single layer.
        GraphableMegatronModule.__init__(self, config=config, vp_stage=vp_stage)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.pg_collection = pg_collection
        self.tp_group = pg_collection.tp
        self.submodules_config = submodules
        self.is_mtp_layer = self.is_moe_layer = False
        self.layer_number = layer_number + get_transformer_layer_offset(
            config, vp_stage, get_pg_rank(pg_collection.pp)
        )
        unrolled = len(submodules.layer_specs) * recursion.num_recursions
        require_one_precision(config, self.layer_number - 1, unrolled)
        part = part or BlockPart(len(submodules.layer_specs))
        self.is_entry = part.routes
        self.inputs = SequenceInputs(config, pg_collection)
        stack = StepStack(
            config,
            submodules.layer_specs,
            recursion,
            part,
            self.layer_number - 1,
            pg_collection,
            vp_stage,
        )
        # Built on every rank, so that the random numbers drawn for later modules do not depend on
        # what this rank does.
        router = recursion.router.build(config.hidden_size, recursion.num_recursions)
        if not part.routes:
            router = CombiningRouter(router)
        step_input = None
        if part.routes:
            step_input = recursion.build_step_input(config.hidden_size, config.layernorm_epsilon)
        streams: LoopState | None = recursion.build_streams(config.hidden_size)
        history: LoopState | None = recursion.build_history(config.hidden_size)
        if not part.routes:
            streams = streams and UpdatingLoopState(streams)
            history = history and UpdatingLoopState(history)
        device = next(stack.parameters()).device
        for module in (router, step_input, streams, history):
            if module is None:
                continue
            module.to(device, config.params_dtype)
            for parameter in module.parameters():
                # Each rank sees only its own tokens, so finalize_model_grads must sum these
                # gradients.
                setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        self.recursion = _Recursion(
            stack,
            router,
            recursion.kv_policy,
            self.inputs.placement(),
            step_input=step_input,
            streams=streams,
            history=history,
        )
        self.statistics = RoutingStatistics(recursion.num_recursions)
        self.loop_loss, self.depth_balance = recursion.loop_loss, recursion.depth_balance
        self.learns_exits = recursion.router.learns_exits
        factors = recursion.router.capacity_factors_for(recursion.num_recursions)
        self.has_fixed_capacities = factors is not None

    @property
    def is_graphed(self) -> bool:
        """Whether the pass that runs is one of training in a CUDA graph (see `graphs`)."""
        return is_graphed(self.config) and self.training

    def _should_call_local_cudagraph(self, *args: Any, **kwargs: Any) -> bool:
        # Evaluation, which may route causally, would replay the pass of training.
        is_training = self.training and not self.causal_routing
        return is_training and super()._should_call_local_cudagraph(*args, **kwargs)

    @property
    def expert_routers(self) -> list[StepTopKRouter]:
        """The expert routers of the shared layers, in order."""
        return [m for m in self.recursion.layers.modules() if isinstance(m, StepTopKRouter)]

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        padding_mask: Tensor | None = None,
        attention_bias: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`[s b h] -> [s b h]`, or `[s/tp b h]` under sequence parallelism; `[s rb h]` for all loops.

        Under context parallelism `s` is this rank's share for the hidden states and the rotary
        table; masks may have that many rows, as Megatron cuts them, or all rows of the sequence.

        With `packed_seq_params`, `b` is 1, `s` counts the tokens of all documents, and the rotary table
        has a row for each position in a document.

        Args:
            context: how many layers each token ran since the last anchor, `[s b]`, which layers pass on
                to one another (`depth_balance`). What cross-attention of other layers attends to is
                passed on as it is.
            attention_mask: None if each sequence is one document. Otherwise Megatron's causal mask
                `[b 1 s s]`, True where attention is not allowed; a document begins at every token
                that cannot attend to the token before it.
            rotary_pos_emb: `[s 1 1 r]`, or None for a model without rotary positions.
            padding_mask: `[b s]`, True at padding.
            inference_context: Megatron's static context. The input is then the next tokens of each
                sequence, routing is causal, and the attention mask is not used.
            packed_seq_params: Megatron's description of documents that are packed into one sequence
                (`thd`). Tokens attend and route within them, and capacities are shares of their
                lengths without padding.

        Raises:
            ValueError: an input is given that the recursion does not support.
        """
        refuse_inputs(attention_bias=attention_bias)
        if self.is_graphed:
            require_equal_sequences(
                self.config,
                attention_mask=attention_mask,
                padding_mask=padding_mask,
                packed_seq_params=packed_seq_params,
            )
        if inference_context is not None:
            refuse_inputs(padding_mask=padding_mask, packed_seq_params=packed_seq_params)
            return self._generate(hidden_states, inference_context, rotary_pos_emb, context)
        packed = self.inputs.packed(hidden_states, attention_mask, packed_seq_params)
        tokens, num_documents = self.inputs.tokens(
            hidden_states, attention_mask, padding_mask, packed
        )
        rotation = self._rotation(rotary_pos_emb, hidden_states, tokens.sequence_length, packed)
        relayout = self.inputs.relayout(tokens.sequence_length, packed, hidden_states.device)
        if relayout is not None:
            hidden_states = relayout.to_sequence(hidden_states)
        # Recomputation runs the forward pass twice, the first time without gradients. It is counted
        # once.
        is_counted = not self.is_graphed and (torch.is_grad_enabled() or not self.training)
        if is_counted:
            self._begin_counting()
        for router in self.expert_routers:
            router.batch_size = tokens.count
        is_compiled = self.compiled and self.training and not self.causal_routing
        output = (self.compiled[0] if is_compiled else self.recursion)(
            hidden_states,
            tokens,
            self.causal_routing,
            self._returns_every_loop(),
            self._plan(context, tokens),
            rotation=rotation,
            num_documents=num_documents,
        )
        if is_counted:
            self.statistics.record(tokens, output)
        hidden = self._attach_losses(output)
        if output.states:
            if self.learns_exits:
                self.read_out = tuple(state.detach() for state in output.states), tokens
            hidden = self._all_loops(hidden, output.states, tokens)
        if relayout is not None:
            hidden = relayout.to_zigzag(hidden)
        hidden = hidden.contiguous()  # as pipeline stages send it; a history ends in a slice
        hidden = make_viewless_tensor(hidden, hidden.requires_grad, keep_graph=True)
        return hidden, self._ran(context, tokens, output)

    def teach(
        self, is_right: Bool[Tensor, "r s b"], is_counted: Bool[Tensor, "s b"]
    ) -> Float[Tensor, ""]:
        """The loss by which the router learns where the tokens of the last forward pass should exit.

        Args:
            is_right: whether the most likely token is the right one, read out after each step.
            is_counted: which tokens have a label.
        """
        assert self.read_out is not None
        (states, tokens), self.read_out = self.read_out, None
        placement = self.recursion.placement

        def gather(logits: Tensor) -> Tensor:
            return placement.gather(logits[..., None], tokens.sequence_length)[..., 0]

        if tokens.is_padding is not None:
            is_counted = is_counted & ~tokens.is_padding
        losses = self.recursion.router.teach(states, is_right, is_counted, gather)
        loss = torch.stack(list(losses.values())).sum()
        return self._as_megatron_averages(loss, tokens)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Each shared weight once.

        Keys begin with `recursion.` and `layers`, `router`, `step_input`, `streams` or `history`.
        """
        assert not sharded_offsets, "layers of a recursion have keys of their own"
        parts: dict[str, Any] = {
            f"layers.{index}.": layer
            for index, layer in enumerate(self.recursion.layers)  # type: ignore[arg-type]
        }
        state: dict[str, Any] = {}
        for name, module in (parts | self._parts_beside_layers()).items():
            state |= sharded_state_dict_default(
                module, f"{prefix}recursion.{name}", (), metadata, tp_group=self.tp_group
            )
        return state

    def _parts_beside_layers(self) -> dict[str, nn.Module]:
        """What a recursion has beside its layers, by the prefix of its checkpoint keys."""
        parts: dict[str, nn.Module] = {"router.": self.recursion.router}
        for name in ("step_input", "streams", "history"):
            if getattr(self.recursion, name) is not None:
                parts[f"{name}."] = getattr(self.recursion, name)
        return parts

    def _rotation(
        self,
        rotary_pos_emb: Tensor | None,
        hidden: Tensor,
        length: int,
        packed: PackedDocuments | None = None,
    ) -> StepRotation | None:
        """The rotary table of a sequence of `length` tokens."""
        attention = attentions_of(self.recursion.layers[0])[0]  # type: ignore[index]
        return self.inputs.rotation(attention, rotary_pos_emb, hidden.dtype, length, packed)

    def _generate(
        self,
        hidden: Tensor,
        memory: Any,
        rotary_pos_emb: Tensor | None,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """`[n b h] -> [n b h]` for the prompt, or for the next tokens of each sequence, and the context
        of the next layer.
        """
        require_static_generation(self.config, memory)
        stack = cast(StepStack, self.recursion.layers)
        length, batch = hidden.shape[:2]
        rotation = self._rotation(rotary_pos_emb, hidden, memory.sequence_len_offset + length)
        steps, policy = self.statistics.num_recursions, self.recursion.kv_policy
        cache = StaticCache(memory, policy, steps, stack.layers_per_step, stack.first_layer, batch)
        tokens = cache.entering(length, hidden.device)
        self._begin_counting()
        plan = self._plan(context, tokens)
        output = self.recursion(hidden, tokens, True, plan=plan, rotation=rotation, cache=cache)
        self.statistics.record(tokens, output)
        return output.hidden, self._ran(context, tokens, output)

    def _plan(self, ran: Tensor | None, tokens: Tokens) -> Tensor | None:
        """By how much each token's logit falls for the layers that it ran, `[s b 1]`."""
        if self.depth_balance is None:
            return None
        ran = torch.zeros_like(tokens.positions) if ran is None else ran
        return (self.depth_balance * ran)[..., None]

    def _ran(
        self, context: Tensor | None, tokens: Tokens, output: RecursionOutput
    ) -> Tensor | None:
        """What the next layer gets as its context."""
        if self.depth_balance is None:  # at an anchor, counting begins anew
            is_count = context is not None and not context.is_floating_point()
            return None if is_count else context
        ran = output.depths.gather(0, tokens.positions)
        return ran if context is None else context + ran

    def _begin_counting(self) -> None:
        updates = getattr(self.config.finalize_model_grads_func, "updates_routers", False)
        if self.statistics.begin(self.training, forgets_evaluation=updates):
            for router in self.expert_routers:
                router.cells.clear()

    def _returns_every_loop(self) -> bool:
        if self.loop_loss is None or not self.training:
            return False
        if self.returns_every_loop is None:
            raise ValueError(
                "loop_loss needs the states of all loops at the output layer. Call "
                "mor_megatron.training.weigh_loops(model) after building the model."
            )
        return self.returns_every_loop

    def _all_loops(self, last: Tensor, states: tuple[Tensor, ...], tokens: Tokens) -> Tensor:
        """`[s b h]` of each loop, the last one's with its losses attached, to `[s rb h]`."""
        assert self.loop_loss is not None
        hidden = over_loops([*states[:-1], last])
        if not (self.loop_loss.scale_penalty and torch.is_grad_enabled()):
            return hidden
        own = self.recursion.placement.shard(RoutingDecision.everything(tokens)).tokens
        # Ranks that share a sequence each have a part of the mean.
        penalty = self.loop_loss.penalty(states, own.is_padding, tokens.count)
        penalty = self._as_megatron_averages(penalty, tokens)
        return RouterLossScaler.apply(hidden, penalty)  # type: ignore[return-value]

    def _attach_losses(self, output: RecursionOutput) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and output.losses):
            return output.hidden
        loss = torch.stack(list(output.losses.values())).sum()
        loss = self._as_megatron_averages(loss, output.decisions[0].tokens)
        return RouterLossScaler.apply(output.hidden, loss)  # type: ignore[return-value]

    def _as_megatron_averages(self, mean: Tensor, tokens: Tokens) -> Tensor:
        """A mean over tokens, or their sum where Megatron divides the gradients by the global number of
        tokens at the end of the batch.
        """
        return mean * tokens.count if self.config.calculate_per_token_loss else mean
