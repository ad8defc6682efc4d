"""MoRTransformer: a small complete decoder in the Llama layout, from the parts of this package.

Legend: `b` batch, `s` sequence, `k` tokens that run a step, `h` hidden, `n` query heads, `g`
key-value heads, `d` head size, `v` vocabulary. Token ids are batch first, as tokenizers give them;
inside, states are sequence first.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mor_layers.attention import StepContext
from mor_layers.config import DecoderConfig
from mor_layers.moe import ExpertUse, MoE
from mor_layers.recursion import RecursionBlock, RecursionOutput, summed
from mor_layers.relaxation import Relaxation, RelaxedLinear, make_projection, project
from mor_layers.routing import Tokens


@dataclass(frozen=True)
class DecoderOutput:
    """What a forward pass of `MoRTransformer` gives."""

    logits: Float[Tensor, "b s v"]
    """Logits of the next token."""
    recursions: tuple[RecursionOutput, ...]
    """One per recursion block: decisions, depths, losses."""
    lm_loss: Float[Tensor, ""] | None = None
    """Mean cross entropy in nats per token, where labels were given."""
    prelude_experts: dict[int, ExpertUse] = field(default_factory=dict)
    """What the experts of each layer before the recursion did."""
    coda_experts: dict[int, ExpertUse] = field(default_factory=dict)
    """What the experts of each layer after it did."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of all routers by name, coefficients multiplied in."""
        ends = (*self.prelude_experts.values(), *self.coda_experts.values())
        return summed([*(r.losses for r in self.recursions), *(use.losses for use in ends)])

    @property
    def loss(self) -> Float[Tensor, ""]:
        """What to minimise: the language-model loss and every auxiliary loss.

        Raises:
            ValueError: the forward pass had no labels.
        """
        if self.lm_loss is None:
            raise ValueError("there is no loss without labels. Call model(ids, labels=...).")
        return sum(self.losses.values(), self.lm_loss)

    @property
    def depths(self) -> Int[Tensor, "b s"]:
        """Steps each token took, summed over recursions."""
        return sum((r.depths for r in self.recursions[1:]), self.recursions[0].depths).T


class StepNorm(nn.Module):
    """RMSNorm of the last dimension, whose weight is shared by all steps, or is one per step."""

    def __init__(self, hidden_size: int, epsilon: float, num_weights: int = 1) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weights = nn.ParameterList(
            nn.Parameter(torch.ones(hidden_size)) for _ in range(num_weights)
        )

    def forward(
        self, hidden: Float[Tensor, "k b h"], step: int | Int[Tensor, "k b"] = 0
    ) -> Float[Tensor, "k b h"]:
        weight = self.weights[0]
        if len(self.weights) > 1:  # one step for all rows, or one for each while generating
            is_int = isinstance(step, int)
            weight = self.weights[step] if is_int else torch.stack(tuple(self.weights))[step]
        return F.rms_norm(hidden.float(), hidden.shape[-1:], eps=self.epsilon).to(hidden) * weight


class Attention(nn.Module):
    """Grouped-query self-attention with RoPE, under any KV policy."""

    def __init__(self, config: DecoderConfig, layer: int, num_steps: int = 1) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        width, kv_width = (n * config.head_size for n in (config.num_heads, config.kv_heads))
        size, bias = config.hidden_size, config.qkv_bias
        how = _relaxation(config, num_steps), num_steps
        self.query = make_projection("query", size, width, *how, bias)
        self.key = make_projection("key", size, kv_width, *how, bias)
        self.value = make_projection("value", size, kv_width, *how, bias)
        self.output = make_projection("output", width, size, *how)
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            self.query_norm = StepNorm(config.head_size, config.rms_norm_epsilon)
            self.key_norm = StepNorm(config.head_size, config.rms_norm_epsilon)

    @property
    def num_heads(self) -> tuple[int, int]:
        """Query and key-value heads that are computed here; see `tensor_parallel`."""
        rows = len(self.query.weight), len(self.key.weight)
        return rows[0] // self.head_size, rows[1] // self.head_size

    def forward(
        self, hidden: Float[Tensor, "kx b h"], context: StepContext, rotary: "Rotary"
    ) -> Float[Tensor, "k b h"]:
        """`hidden` has the rows of `context.with_exited`; the result those that run the step."""
        running = hidden[: context.tokens.shape[0]]
        query = rotary.turn(self._heads(project(self.query, running, context), self.query_norm))
        key = value = None
        if context.projects_keys:
            projected = hidden[: context.num_projected]
            key = rotary.turn(self._heads(project(self.key, projected, context), self.key_norm))
            value = self._heads(project(self.value, projected, context))
        out = context.attend(self.layer, query, key, value)
        return project(self.output, out.flatten(2), context)  # [k b n d] -> [k b h]

    def _heads(self, values: Tensor, norm: StepNorm | None = None) -> Tensor:
        heads = values.unflatten(-1, (-1, self.head_size))  # [k b nd] -> [k b n d]
        return heads if norm is None else norm(heads)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig, num_steps: int = 1) -> None:
        super().__init__()
        size, width = config.hidden_size, config.ffn_hidden_size
        how = _relaxation(config, num_steps), num_steps
        self.gate = make_projection("gate", size, width, *how)
        self.up = make_projection("up", size, width, *how)
        self.down = make_projection("down", width, size, *how)

    def forward(self, hidden: Float[Tensor, "k b h"], context: StepContext) -> Tensor:
        """`[k b h] -> [k b h]`."""
        gate, up = project(self.gate, hidden, context), project(self.up, hidden, context)
        return project(self.down, F.silu(gate) * up, context)


def _relaxation(config: DecoderConfig, num_steps: int) -> Relaxation | None:
    """Of layers that run in so many steps; those outside the recursion run once."""
    return config.effective_recursion.relaxation if num_steps > 1 else None


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and inside a residual."""

    def __init__(
        self, config: DecoderConfig, layer: int, num_norms: int = 1, num_steps: int = 1
    ) -> None:
        super().__init__()
        self.attention_norm = StepNorm(config.hidden_size, config.rms_norm_epsilon, num_norms)
        self.attention = Attention(config, layer, num_steps)
        self.mlp_norm = StepNorm(config.hidden_size, config.rms_norm_epsilon, num_norms)
        self.mlp = MLP(config, num_steps) if config.moe is None else _experts(config, num_steps)
        self.attention_output_norm = self.mlp_output_norm = None
        if num_steps > 1 and config.effective_recursion.sandwich_norms:
            sizes = config.hidden_size, config.rms_norm_epsilon, num_norms
            self.attention_output_norm, self.mlp_output_norm = StepNorm(*sizes), StepNorm(*sizes)

    def forward(
        self, hidden: Float[Tensor, "k b h"], context: StepContext, rotary: "Rotary"
    ) -> Float[Tensor, "k b h"]:
        normed = self.attention_norm(context.with_exited(hidden), context.step)
        output = self.attention(normed, context, rotary)
        if self.attention_output_norm is not None:
            output = self.attention_output_norm(output, context.step)
        hidden = hidden + output
        normed = self.mlp_norm(hidden, context.step)
        if isinstance(self.mlp, MoE):
            output, use = self.mlp(normed, context.step, context.tokens.is_padding)
            context.expert_use[self.attention.layer] = use
        else:
            output = self.mlp(normed, context)
        if self.mlp_output_norm is not None:
            output = self.mlp_output_norm(output, context.step)
        return hidden + output


def _experts(config: DecoderConfig, num_steps: int) -> MoE:
    assert config.moe is not None
    width, recursion = config.ffn_hidden_size, config.recursion
    if num_steps == 1 or recursion is None:
        return MoE(config.hidden_size, width, config.moe)
    routers, means = recursion.expert_routers, recursion.mean_experts
    return MoE(config.hidden_size, width, config.moe, num_steps, routers, means)


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines at given positions; turns heads by them (Su et al. 2021, halves paired)."""

    cos: Float[Tensor, "k b 1 d"]
    sin: Float[Tensor, "k b 1 d"]

    @classmethod
    def at(
        cls, positions: Int[Tensor, "k b"], head_size: int, base: float, dtype: torch.dtype
    ) -> "Rotary":
        """The rotation of each position, computed in fp32."""
        exponent = torch.arange(0, head_size, 2, device=positions.device).float() / head_size
        angles = positions[..., None].float() * base**-exponent  # [k b] -> [k b d/2]
        angles = torch.cat([angles, angles], dim=-1)[:, :, None]
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def turn(self, heads: Float[Tensor, "k b n d"]) -> Float[Tensor, "k b n d"]:
        """Turn the first `k` rows' heads."""
        first, second = heads.chunk(2, dim=-1)
        cos, sin = self.cos[: len(heads)], self.sin[: len(heads)]
        return heads * cos + torch.cat([-second, first], dim=-1) * sin


class DecoderStack(nn.Module):
    """Decoder layers one after another: what a RecursionBlock wraps, and prelude and coda too.

    Args:
        num_norms: weights of each norm: one, or one a step.
        num_steps: recursion steps that the stack runs in.
    """

    def __init__(
        self, config: DecoderConfig, num_layers: int, num_norms: int = 1, num_steps: int = 1
    ) -> None:
        super().__init__()
        self.head_size, self.rope_base = config.head_size, config.rope_base
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, num_norms, num_steps) for layer in range(num_layers)
        )

    def forward(
        self, hidden: Float[Tensor, "k b h"], context: StepContext
    ) -> Float[Tensor, "k b h"]:
        positions = context.projected_positions
        rotary = Rotary.at(positions, self.head_size, self.rope_base, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, context, rotary)
        return hidden

    def advance(self, step: int, uses: list[dict[int, ExpertUse]]) -> None:
        """Let the layers' routers over experts change their state after an optimizer step.

        Args:
            uses: `StepContext.expert_use` of the runs of `step` that it learnt from.
        """
        for index, layer in enumerate(self.layers):
            if isinstance(layer.mlp, MoE):
                own = [use[index] for use in uses]
                wanted = torch.stack([use.load + use.dropped for use in own]).sum(dim=0)
                histograms = [use.histogram for use in own if use.histogram is not None]
                histogram = torch.stack(histograms).sum(dim=0) if histograms else None
                layer.mlp.router.advance(step, wanted, histogram)


class MoRTransformer(nn.Module):
    """A decoder-only language model whose middle is a recursion.

    Args:
        config: sizes and the recursion; without a recursion it is a plain decoder.
        recompute: recompute the recursion's layers in the backward pass.
    """

    def __init__(self, config: DecoderConfig, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        recursion, schedule = config.effective_recursion, config.schedule
        ends = config
        if config.dense_ends:
            ends = replace(config, moe=None, dense_ends=False, recursion=None)
        num_norms = 1 if recursion.share_norms else recursion.num_recursions

        def block(num_layers: int) -> RecursionBlock:
            router = recursion.router.build(config.hidden_size, recursion.num_recursions)
            stack = DecoderStack(config, num_layers, num_norms, recursion.num_recursions)
            step_input = recursion.build_step_input(config.hidden_size)
            return RecursionBlock(
                stack, router, recursion.kv_policy, recompute=recompute, step_input=step_input
            )

        # A cyclic step runs the whole block; in a sequence each layer repeats on its own.
        sizes = [schedule.block_size] if schedule.is_cyclic else [1] * schedule.block_size
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.prelude = DecoderStack(ends, schedule.prelude)
        self.recursions = nn.ModuleList(block(size) for size in sizes)
        self.coda = DecoderStack(ends, schedule.coda)
        self.norm = StepNorm(config.hidden_size, config.rms_norm_epsilon)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._initialize)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if not isinstance(module, nn.Linear | nn.Embedding) or module.weight.is_meta:
            return  # nothing to draw on the meta device, where it takes long
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, RelaxedLinear):
            module.reset_deltas()

    @property
    def num_heads(self) -> tuple[int, int]:
        """Query and key-value heads of each layer that are computed here."""
        return self.recursions[0].layers.layers[0].attention.num_heads  # type: ignore[union-attr]

    def forward(
        self,
        ids: Int[Tensor, "b s"],
        labels: Int[Tensor, "b s"] | None = None,
        documents: Int[Tensor, "b s"] | None = None,
        is_padding: Bool[Tensor, "b s"] | None = None,
        causal_routing: bool = False,
    ) -> DecoderOutput:
        """Logits of every next token, and the loss where `labels` are given.

        Args:
            ids: token ids.
            labels: the id that follows each token; negative where none should be learnt.
            documents: numbers that change where a document begins; tokens see and compete with
                those of their own document only.
            is_padding: True where `ids` holds no token. Never routed, counted or seen.
            causal_routing: let no token's depth depend on later tokens, as generation does.

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
        outputs = []
        for recursion in self.recursions:
            outputs.append(recursion(hidden, tokens, causal_routing))
            hidden = outputs[-1].hidden
        hidden = self.norm(self.coda(hidden, after))
        logits = self.output(hidden).transpose(0, 1)  # [s b v] -> [b s v]
        lm_loss = None
        if labels is not None:
            if is_padding is not None:
                labels = labels.masked_fill(is_padding.T, -1)
            labels = labels.clamp(min=-1)
            lm_loss = F.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-1
            )
        return DecoderOutput(logits, tuple(outputs), lm_loss, before.expert_use, after.expert_use)

    def generate(
        self,
        ids: Int[Tensor, "b s"],
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[Int[Tensor, " b"]]:
        """Continue each sequence, one token at a time, with causal routing and no cache.

        Args:
            ids: prompts of one length.
            max_new_tokens: how many tokens to yield.
            temperature: 0 takes the likeliest token; above 0 samples.
            generator: source of randomness for sampling.

        Raises:
            ValueError: a negative temperature, or fewer than one token asked for.
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
        """Let routers, over depth and over experts, change their state after an optimizer step.

        Args:
            outputs: the forward passes that the step learnt from. With several processes, sum
                what these say over all of them and call each router's methods yourself.
        """
        for i, recursion in enumerate(self.recursions):
            own = [output.recursions[i] for output in outputs]
            counts = [torch.stack([d.tokens.count for d in run.decisions]) for run in own]
            recursion.router.advance(torch.stack(counts).sum(dim=0))
            recursion.router.adjust(summed([run.observations for run in own]))
            for step in range(recursion.router.num_recursions):
                recursion.layers.advance(step, [run.expert_use[step] for run in own])
        self.prelude.advance(0, [output.prelude_experts for output in outputs])
        self.coda.advance(0, [output.coda_experts for output in outputs])
