"""MoRTransformer: a small, complete decoder in the Llama layout, built from this library's parts.

Legend: `b` batch, `s` sequence, `k` tokens that run a step, `h` hidden, `n` query heads, `g`
key-value heads, `d` head size, `v` vocabulary. Token ids are batch first, as tokenizers return them;
inside the model, states are sequence first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mor_layers.layers import RelaxedLinear
from mor_layers.models.config import DecoderConfig
from mor_layers.models.layers import DecoderStack, ScaledEmbedding, StepNorm
from mor_layers.models.prediction_heads import PredictionHead, head_losses
from mor_layers.models.recursion_config import RecursionConfig
from mor_layers.recursion import (
    ExpertUse,
    RecursionBlock,
    RecursionOutput,
    StepContext,
    expected_loss,
    over_loops,
    summed,
)
from mor_layers.selection import Tokens


@dataclass(frozen=True)
class DecoderOutput:
    """The result of a forward pass of `MoRTransformer`."""

    logits: Float[Tensor, "b s v"]
    """Logits of the next token."""
    recursions: tuple[RecursionOutput, ...]
    """One per recursion block: decisions, depths, losses. Under sequence sharing a recursion has a block
    for each of its layers."""
    lm_loss: Float[Tensor, ""] | None = None
    """Mean cross entropy in nats per token; with a `loop_loss` in training, that of all loops, weighted
    by its prior. None without labels."""
    prelude_experts: dict[int, ExpertUse] = field(default_factory=dict)
    """Statistics and losses of the experts of each layer before the recursion."""
    coda_experts: dict[int, ExpertUse] = field(default_factory=dict)
    """Statistics and losses of the experts of each layer after the recursion."""

    loop_losses: dict[str, Tensor] = field(default_factory=dict)
    """Losses on the states after each loop, and of the heads of multi-token prediction, multiplied by
    their coefficients."""
    between_experts: tuple[dict[int, ExpertUse], ...] = ()
    """Statistics and losses of the experts of each layer between two recursions, for every such pair."""
    owners: tuple[int, ...] = ()
    """The recursion that each of `recursions` is a block of, by its 0-based number among those of the
    model. Empty if there is only one."""
    head_experts: tuple[dict[int, ExpertUse], ...] = ()
    """Statistics and losses of the experts of each head of multi-token prediction, if they ran."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses by name, multiplied by their coefficients.

        Where there are several recursions, the names of their losses begin with `recursion_1/`,
        `recursion_2/` and so on.
        """
        before, after = self.prelude_experts, self.coda_experts
        stacks = (before, *self.between_experts, after, *self.head_experts)
        outside = [use.losses for stack in stacks for use in stack.values()]
        losses = [run.losses for run in self.recursions]
        for index, owner in enumerate(self.owners):
            losses[index] = {f"recursion_{owner + 1}/{n}": v for n, v in losses[index].items()}
        return summed([*losses, *outside, self.loop_losses])

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The loss to minimise: the language-model loss plus all auxiliary losses.

        Raises:
            ValueError: the forward pass had no labels.
        """
        if self.lm_loss is None:
            raise ValueError("there is no loss without labels. Call model(ids, labels=...).")
        return sum(self.losses.values(), self.lm_loss)

    @property
    def depths(self) -> Int[Tensor, "b s"]:
        """Number of steps that each token took, summed over recursions."""
        return sum((r.depths for r in self.recursions[1:]), self.recursions[0].depths).T


def _mean_loss(
    logits: Float[Tensor, "rb s v"], labels: Int[Tensor, "b s"], weights: Sequence[float]
) -> Float[Tensor, ""]:
    """Mean over the tokens with a label, of the losses of all loops weighted by the prior."""
    every = labels.repeat(len(weights), 1)
    flat = logits.flatten(0, 1).float()
    if len(weights) == 1:
        return F.cross_entropy(flat, every.flatten(), ignore_index=-1)
    losses = F.cross_entropy(flat, every.flatten(), ignore_index=-1, reduction="none")
    return expected_loss(losses.view_as(every), weights).sum() / (labels >= 0).sum()


def _blocks(part: DecoderConfig, recompute: bool) -> list[RecursionBlock]:
    """The blocks of a part's recursion, with weights and routers of their own."""
    recursion, schedule, size = part.effective_recursion, part.schedule, part.hidden_size
    num_norms = 1 if recursion.share_norms else recursion.num_recursions

    def block(index: int, num_layers: int) -> RecursionBlock:
        router = recursion.router_of(index).build(size, recursion.num_recursions)
        stack = DecoderStack(part, num_layers, num_norms, recursion.num_recursions)
        return RecursionBlock(
            stack,
            router,
            recursion.kv_policy,
            recompute=recompute,
            step_input=recursion.build_step_input(size, part.rms_norm_epsilon),
            streams=recursion.build_streams(size),
            history=recursion.build_history(size),
        )

    # With cyclic sharing a step runs the whole block; with sequence sharing each layer repeats by
    # itself, so each is a block of its own.
    num_layers = schedule.block_size // schedule.num_blocks
    return [block(index, num_layers) for index in range(schedule.num_blocks)]


def _recur(
    recursion: RecursionConfig,
    blocks: Sequence[RecursionBlock],
    hidden: Float[Tensor, "s b h"],
    tokens: Tokens,
    causal_routing: bool,
    keeps_states: bool,
) -> list[RecursionOutput]:
    """Run the blocks of a recursion, one after another."""
    outputs, balance = [], recursion.depth_balance
    ran = tokens.positions.new_zeros(hidden.shape[:2])  # layers of each token since the last anchor
    for index, block in enumerate(blocks):
        is_anchor = recursion.router_of(index) is not recursion.router
        plan = None if balance is None or is_anchor else (balance * ran)[..., None]
        outputs.append(block(hidden, tokens, causal_routing, keeps_states, plan))
        hidden = outputs[-1].hidden
        if balance is not None:
            ran = torch.zeros_like(ran) if is_anchor else ran + outputs[-1].depths
    return outputs


class MoRTransformer(nn.Module):
    """A decoder-only language model with one or more recursions.

    Layers run in this order: `prelude`, the blocks of the first recursion, `between[0]`, those of the
    second, and so on, and `coda`. All blocks are in `recursions`.

    Args:
        config: the sizes and the recursions; without a recursion, the model is a plain decoder.
        recompute: whether to recompute the recursions' layers in the backward pass.
    """

    def __init__(self, config: DecoderConfig, recompute: bool = False) -> None:
        super().__init__()
        self.config, self._parts = config, config.parts
        self._recursions = [part.effective_recursion for part in self._parts]
        moe = None if config.dense_ends else config.moe
        outside = replace(config, moe=moe, dense_ends=False, recursion=None)
        schedules = [part.schedule for part in self._parts]
        scale = config.embedding_scale
        self.embedding = ScaledEmbedding(config.vocab_size, config.hidden_size, scale)
        self.prelude = DecoderStack(outside, schedules[0].prelude)
        blocks = [_blocks(part, recompute) for part in self._parts]
        self._owners = [owner for owner, own in enumerate(blocks) for _ in own]
        self.recursions = nn.ModuleList(block for own in blocks for block in own)
        self.between = nn.ModuleList(
            DecoderStack(outside, earlier.coda + later.prelude)
            for earlier, later in pairwise(schedules)
        )
        exit_norm = self._recursions[-1].exit_norm
        self.coda = DecoderStack(outside, schedules[-1].coda, norms_input=exit_norm)
        self.norm = StepNorm(config.hidden_size, config.rms_norm_epsilon)
        further = config.multi_token_prediction
        self.prediction_heads = nn.ModuleList(
            PredictionHead(config.head_config)
            for _ in range(0 if further is None else further.num_heads)
        )
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._initialize)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if not isinstance(module, nn.Linear | nn.Embedding) or module.weight.is_meta:
            return  # there is nothing to draw on the meta device, where drawing is slow
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, RelaxedLinear):
            module.reset_deltas()

    @property
    def blocks(self) -> list[list[RecursionBlock]]:
        """The blocks of each recursion, in order; a plain decoder counts as a single step of one."""
        blocks: list[list[RecursionBlock]] = [[] for _ in self._parts]
        for owner, block in zip(self._owners, self.recursions, strict=True):
            blocks[owner].append(cast(RecursionBlock, block))
        return blocks

    def chain(self) -> list["MoRTransformer"]:
        """Decoders with one recursion each that compute one after another what this model does.

        They share its modules; only the first embeds tokens, and only the last reads out. The layers
        between two recursions are in the prelude of the later one.
        """
        if len(self._parts) == 1:
            return [self]
        stacks = [self.prelude, *(cast(DecoderStack, stack) for stack in self.between)]
        chain = []
        for index, (part, blocks) in enumerate(zip(self._parts, self.blocks, strict=True)):
            is_last = index == len(stacks) - 1
            before, after = len(stacks[index].layers), part.schedule.coda if is_last else 0
            recursion = replace(part.effective_recursion, prelude_layers=before, coda_layers=after)
            own = part.schedule.num_unrolled_layers - part.schedule.num_unshared
            config = replace(
                part,
                recursion=recursion,
                num_unrolled_layers=own + before + after,
                dense_ends=self.config.dense_ends and before + after > 0,
                multi_token_prediction=None,
            )
            with torch.device("meta"):
                link = MoRTransformer(config)
            link.embedding, link.norm, link.output = self.embedding, self.norm, self.output
            link.prelude, link.recursions = stacks[index], nn.ModuleList(blocks)
            link.coda = self.coda if is_last else link.coda
            chain.append(link.train(self.training))
        return chain

    @property
    def _heads(self) -> list[PredictionHead]:
        return [cast(PredictionHead, head) for head in self.prediction_heads]

    @property
    def num_heads(self) -> tuple[int, int]:
        """Query and key-value heads of each layer that this rank computes."""
        return self.recursions[0].layers.layers[0].attention.num_heads  # type: ignore[union-attr]

    def forward(
        self,
        ids: Int[Tensor, "b s"],
        labels: Int[Tensor, "b s"] | None = None,
        documents: Int[Tensor, "b s"] | None = None,
        is_padding: Bool[Tensor, "b s"] | None = None,
        causal_routing: bool = False,
    ) -> DecoderOutput:
        """Compute the logits of every next token, and the loss if `labels` are given.

        Args:
            ids: token ids.
            labels: the id that follows each token; negative to ignore a position.
            documents: numbers that change at the start of each document. Tokens attend to, and compete
                with, tokens of their own document only.
            is_padding: True where `ids` has no token. Padding is never routed, counted or attended to.
            causal_routing: whether routing must not depend on later tokens, as in generation.

        Raises:
            ValueError: `ids` is not `[b s]`, or a mask has another shape.
        """
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"ids has shape {tuple(ids.shape)}; expected [b s], neither empty.")
        documents = None if documents is None else documents.T
        is_padding = None if is_padding is None else is_padding.T
        tokens = Tokens.whole_sequence(*ids.T.shape, ids.device, documents, is_padding)
        before, after = StepContext(0, tokens), StepContext(0, tokens)
        hidden = self.prelude(self.embedding(ids.T), before)
        last = self._recursions[-1]
        loop_loss = last.loop_loss
        every_loop = loop_loss is not None and self.training and labels is not None
        outputs, between, losses = [], [], {}
        for recursion, blocks in zip(self._recursions, self.blocks, strict=True):
            if outputs:
                context = StepContext(0, tokens)
                hidden = self.between[len(between)](hidden, context)
                between.append(context.expert_use)
            keeps_states = every_loop and len(between) == len(self.between)
            outputs += _recur(recursion, blocks, hidden, tokens, causal_routing, keeps_states)
            hidden = outputs[-1].hidden
        weights = (1.0,)
        if loop_loss is not None and every_loop:
            states, weights = outputs[-1].states, loop_loss.weights(len(outputs[-1].states))
            hidden, after = over_loops(states), StepContext(0, tokens.repeated(len(states)))
            if loop_loss.scale_penalty:
                losses["scale_penalty"] = loop_loss.penalty(states, is_padding, tokens.count)
        hidden = self.norm(self.coda(hidden, after))
        logits = self.output(hidden).transpose(0, 1)  # [s rb v] -> [rb s v]
        lm_loss = None
        if labels is not None:
            if is_padding is not None:
                labels = labels.masked_fill(is_padding.T, -1)
            lm_loss = _mean_loss(logits, labels.clamp(min=-1), weights)
            if every_loop and last.router.learns_exits:
                right = logits.argmax(dim=-1) == labels.repeat(len(weights), 1)
                right = right.unflatten(0, (len(weights), -1)).transpose(1, 2)  # -> [r s b]
                router = self.recursions[-1].router
                losses |= router.teach(outputs[-1].states, right, labels.T >= 0)
        heads: tuple[dict[int, ExpertUse], ...] = ()
        further = self.config.multi_token_prediction
        if further is not None and labels is not None and self.training:
            states = hidden[:, -len(ids) :]  # of the last loop
            found = head_losses(
                self._heads, self.embedding, self.output, states, ids.T, labels.T, tokens
            )
            losses["multi_token_prediction"] = further.loss_coefficient * found.loss
            heads = found.expert_use
        logits = logits[-len(ids) :]  # of the last loop
        owners = tuple(self._owners) if between else ()
        experts = before.expert_use, after.expert_use
        return DecoderOutput(
            logits, tuple(outputs), lm_loss, *experts, losses, tuple(between), owners, heads
        )

    def generate(
        self,
        ids: Int[Tensor, "b s"],
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[Int[Tensor, " b"]]:
        """Continue each sequence, one token at a time, with causal routing and no cache.

        Args:
            ids: prompts of equal length.
            max_new_tokens: number of tokens to generate.
            temperature: 0 takes the most likely token; above 0, tokens are sampled.
            generator: source of randomness for sampling.

        Raises:
            ValueError: the temperature is negative, or `max_new_tokens` is below 1.
        """
        if temperature < 0 or max_new_tokens < 1:
            raise ValueError(
                f"temperature={temperature} must be 0 or more and "
                f"max_new_tokens={max_new_tokens} at least 1."
            )
        return self._generate(ids, max_new_tokens, temperature, generator)

    @torch.no_grad()
    def _generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        for _ in range(max_new_tokens):
            logits = self(ids, causal_routing=True).logits[:, -1].float()
            if temperature == 0:
                token = logits.argmax(dim=-1)
            else:
                probabilities = (logits / temperature).softmax(dim=-1)
                token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            yield token
            ids = torch.cat([ids, token[:, None]], dim=1)

    def advance(self, outputs: list[DecoderOutput]) -> None:
        """Update the state of the routers over depth and over experts after an optimizer step.

        Args:
            outputs: the forward passes that contributed to the optimizer step. With several processes,
                sum their counts over all processes and call the methods of each router yourself.
        """
        for i, recursion in enumerate(self.recursions):
            own = [output.recursions[i] for output in outputs]
            counts = [torch.stack([d.tokens.count for d in run.decisions]) for run in own]
            recursion.router.advance(torch.stack(counts).sum(dim=0))
            recursion.router.adjust(summed([run.observations for run in own]))
            for step in range(recursion.router.num_recursions):
                recursion.layers.advance(step, [run.expert_use[step] for run in own])
        self.prelude.advance(0, [output.prelude_experts for output in outputs])
        for i, stack in enumerate(self.between):
            cast(DecoderStack, stack).advance(0, [output.between_experts[i] for output in outputs])
        self.coda.advance(0, [output.coda_experts for output in outputs])
        for i, head in enumerate(self._heads):
            uses = [output.head_experts[i] for output in outputs if output.head_experts]
            if uses:
                head.layers.advance(0, uses)
