"""A recursive decoder for vLLM's model runner. Loaded by vLLM alone, see `vllm_plugin`.

Every layer of the block is built once and holds one `Attention` a step, each with a name, and a cache,
of its own unrolled depth. Under `recursive_sharing` those of later steps name step 1's as the target of
vLLM's cross-layer sharing, and have no cache.

Modules are named as those of a MoRTransformer, so a folder's weights find their places by their names
(but for `gate` and `up`, which are one matrix here).

Written against vLLM's sources of 2026 (v1 engine, `Attention.kv_sharing_target_layer_name`); what is
used of them is recorded, and emulated, in tests/mor_vllm/vllm_emulation.py. No vLLM has run it yet.

Legend: `t` tokens of a batch, whatever their requests; `h` hidden, `n` query heads and `g` key-value
heads of this rank, `d` head size.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from vllm.config import VllmConfig  # type: ignore[import-not-found]
from vllm.distributed import get_tensor_model_parallel_world_size  # type: ignore[import-not-found]
from vllm.model_executor.layers.activation import SiluAndMul  # type: ignore[import-not-found]
from vllm.model_executor.layers.attention import Attention  # type: ignore[import-not-found]
from vllm.model_executor.layers.layernorm import RMSNorm  # type: ignore[import-not-found]
from vllm.model_executor.layers.linear import (  # type: ignore[import-not-found]
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor  # type: ignore[import-not-found]
from vllm.model_executor.layers.rotary_embedding import get_rope  # type: ignore[import-not-found]
from vllm.model_executor.layers.vocab_parallel_embedding import (  # type: ignore[import-not-found]
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader  # type: ignore[import-not-found]

from mor_layers import DecoderConfig, RecursionBlock, RoutingDecision, StepContext, Tokens
from mor_layers.weights import weight_names
from mor_vllm.plugin import FIRST_STEP, require_servable

KeysAndValues = dict[int, tuple[Tensor, Tensor]]
"""Of step 1, by layer of the block: what later steps share."""


@dataclass(frozen=True)
class ServedStep(StepContext):
    """A step on a batch of vLLM's, whose attention finds by itself which rows a token sees."""

    first: KeysAndValues = field(default_factory=dict)
    """Filled at step 1 and read by later steps of the same block."""

    @property
    def positions(self) -> Int[Tensor, " t"]:
        return self.tokens.positions[0]  # [1 t] -> [t]


class StepAttention(nn.Module):
    """Attention of one layer that runs at several depths."""

    def __init__(self, config: DecoderConfig, depths: Sequence[int], vllm_config: Any) -> None:
        super().__init__()
        size, ranks = config.head_size, get_tensor_model_parallel_world_size()
        self.head_size = size
        self.shares = config.effective_recursion.kv_policy == "recursive_sharing"
        h, bias = config.hidden_size, config.qkv_bias
        self.query = ColumnParallelLinear(h, config.num_heads * size, bias=bias)
        self.key = ColumnParallelLinear(h, config.kv_heads * size, bias=bias)
        self.value = ColumnParallelLinear(h, config.kv_heads * size, bias=bias)
        self.output = RowParallelLinear(config.num_heads * size, h, bias=False)
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            self.query_norm, self.key_norm = (_norms(config, 1, size) for _ in range(2))
        self.rotary = get_rope(
            size,
            max_position=vllm_config.model_config.max_model_len,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        )
        # The one number in each name is the place in the unrolled model, as vLLM reads it.
        names = [f"model.layers.{depth}.self_attn.attn" for depth in depths]
        self.steps = nn.ModuleList(
            Attention(
                config.num_heads // ranks,
                size,
                size**-0.5,
                num_kv_heads=config.kv_heads // ranks,
                cache_config=vllm_config.cache_config,
                prefix=name,
                kv_sharing_target_layer_name=names[0] if self.shares and index else None,
            )
            for index, name in enumerate(names)
        )

    def forward(
        self,
        hidden: Float[Tensor, "t h"],
        context: ServedStep,
        layer: int,
    ) -> Float[Tensor, "t h"]:
        query = self._heads(self.query(hidden)[0], self.query_norm)
        if self.shares and context.step:
            query, _ = self.rotary(context.positions, query, None)
            key, value = context.first[layer]  # for backends that take a prompt's rows from here
        else:
            key = self._heads(self.key(hidden)[0], self.key_norm)
            value = self.value(hidden)[0]
            query, key = self.rotary(context.positions, query, key)
            context.first[layer] = key, value
        return self.output(self.steps[context.step](query, key, value))[0]

    def _heads(self, values: Float[Tensor, "t nd"], norm: Any) -> Float[Tensor, "t nd"]:
        if norm is None:
            return values
        return norm[0](values.unflatten(-1, (-1, self.head_size))).flatten(-2)


class SwiGLU(nn.Module):
    """The MLP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        h, width = config.hidden_size, config.ffn_hidden_size
        self.gate_up = MergedColumnParallelLinear(h, [width] * 2, bias=False)
        self.down = RowParallelLinear(width, h, bias=False)
        self.activation = SiluAndMul()

    def forward(self, hidden: Float[Tensor, "t h"]) -> Float[Tensor, "t h"]:
        return self.down(self.activation(self.gate_up(hidden)[0]))[0]


class StepLayer(nn.Module):
    """Attention and MLP, as `mor_layers.models.layers.DecoderLayer`."""

    def __init__(self, config: DecoderConfig, depths: Sequence[int], vllm_config: Any) -> None:
        super().__init__()
        recursion = config.effective_recursion
        repeats = len(depths) > 1
        count = len(depths) if repeats and not recursion.share_norms else 1
        self.attention_norm = _norms(config, count)
        self.attention = StepAttention(config, depths, vllm_config)
        self.mlp_norm = _norms(config, count)
        self.mlp = SwiGLU(config)
        self.attention_output_norm = self.mlp_output_norm = None
        if repeats and recursion.sandwich_norms:
            self.attention_output_norm, self.mlp_output_norm = (
                _norms(config, count) for _ in range(2)
            )

    def forward(
        self, hidden: Float[Tensor, "t h"], context: ServedStep, layer: int
    ) -> Float[Tensor, "t h"]:
        own = context.step if len(self.attention_norm) > 1 else 0
        output = self.attention(self.attention_norm[own](hidden), context, layer)
        if self.attention_output_norm is not None:
            output = self.attention_output_norm[own](output)
        hidden = hidden + output
        output = self.mlp(self.mlp_norm[own](hidden))
        if self.mlp_output_norm is not None:
            output = self.mlp_output_norm[own](output)
        return hidden + output


class StepLayers(nn.Module):
    """Layers one after another, each at its own depths."""

    def __init__(self, config: DecoderConfig, depths: Sequence[Sequence[int]], vllm: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(StepLayer(config, own, vllm) for own in depths)

    def forward(self, hidden: Float[Tensor, "t h"], context: ServedStep) -> Float[Tensor, "t h"]:
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, context, index)
        return hidden


class MaskedRecursion(RecursionBlock):
    """Runs every token through every step; one that exited keeps its state.

    Each token counts as a sequence, of which a decision keeps its one row, if only as padding. So
    nothing is selected, shapes are those of the batch whatever the router says, and nothing waits
    for the device.
    """

    def forward(  # type: ignore[override]
        self, hidden: Float[Tensor, "t h"], tokens: Tokens
    ) -> Float[Tensor, "t h"]:
        rows = origin = hidden[None]  # [t h] -> [1 t h]
        decision = RoutingDecision.everything(tokens)
        first: KeysAndValues = {}
        for step in range(self.router.num_recursions):
            decision = self.route(rows, step, decision, causal=True, assess=False)
            context = ServedStep(step, decision.tokens, first)
            output = self.run_layers(self.enter(step, rows, origin)[0], context)[None]
            rows = self.combine(step, rows, output, decision, origin)
        return rows[0]


class MoRModel(nn.Module):
    """The decoder, its output matrix included."""

    def __init__(self, config: DecoderConfig, vllm_config: Any) -> None:
        super().__init__()
        recursion, schedule = config.effective_recursion, config.schedule
        steps, size, before = recursion.num_recursions, schedule.block_size, schedule.prelude

        def block(depths: list[list[int]]) -> MaskedRecursion:
            with _in_fp32():  # routers score in it, and their buffers must not be rounded
                router = recursion.router.build(config.hidden_size, steps)
            added = recursion.build_step_input(config.hidden_size)
            layers = StepLayers(config, depths, vllm_config)
            return MaskedRecursion(layers, router, recursion.kv_policy, step_input=added)

        if schedule.is_cyclic:
            runs = [[[before + r * size + j for r in range(steps)] for j in range(size)]]
        else:
            runs = [[[before + j * steps + r for r in range(steps)]] for j in range(size)]
        last = config.num_unrolled_layers
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.prelude = StepLayers(config, [[d] for d in range(before)], vllm_config)
        self.recursions = nn.ModuleList(block(depths) for depths in runs)
        coda = range(last - schedule.coda, last)
        self.coda = StepLayers(config, [[d] for d in coda], vllm_config)
        self.norm = _norms(config, 1)
        head = ParallelLMHead(config.vocab_size, config.hidden_size)
        self.output = head.tie_weights(self.embedding) if config.tie_embeddings else head

    def forward(self, hidden: Float[Tensor, "t h"], positions: Int[Tensor, " t"]) -> Tensor:
        """The last norm's output, `[t h]`."""
        tokens = Tokens(positions[None], 1)
        hidden = self.prelude(hidden, ServedStep(0, tokens))
        for recursion in self.recursions:
            hidden = recursion(hidden, tokens)
        return cast(Any, self.norm)[0](self.coda(hidden, ServedStep(0, tokens)))


class MoRForCausalLM(nn.Module):
    """What vLLM builds, loads and runs.

    Raises:
        ValueError: a model, or a layout, that vLLM would compute otherwise; see `require_servable`.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.quant_config is not None:
            raise ValueError("a quantized recursion was never tried. Leave out quantization=.")
        self.decoder_config: DecoderConfig = vllm_config.model_config.hf_config.decoder_config
        require_servable(self.decoder_config, get_tensor_model_parallel_world_size())
        self.model = MoRModel(self.decoder_config, vllm_config)
        self.logits_processor = LogitsProcessor(self.decoder_config.vocab_size)

    def embed_input_ids(self, input_ids: Int[Tensor, " t"]) -> Float[Tensor, "t h"]:
        return self.model.embedding(input_ids)

    def forward(
        self,
        input_ids: Int[Tensor, " t"] | None,
        positions: Int[Tensor, " t"],
        intermediate_tensors: Any = None,
        inputs_embeds: Float[Tensor, "t h"] | None = None,
    ) -> Float[Tensor, "t h"]:
        assert intermediate_tensors is None, (
            "vLLM refuses pipelines for models that say nothing of them"
        )
        hidden = inputs_embeds
        if hidden is None:
            assert input_ids is not None
            hidden = self.embed_input_ids(input_ids)
        return self.model(hidden, positions)

    def compute_logits(self, hidden_states: Float[Tensor, "t h"]) -> Tensor | None:
        return self.logits_processor(self.model.output, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Names of the parameters and buffers that the folder's tensors went to.

        Raises:
            ValueError: a tensor has no place, one is missing, or the router is tuned to leave tokens
                out of step 1.
        """
        places = dict(self.named_parameters()) | dict(self.named_buffers())
        seen, loaded = set(), set()
        for name, tensor in weights:
            place, part = place_of(name)
            if place not in places:
                raise ValueError(f"{name!r} has no place in this model. Is config.json its own?")
            target = places[place]
            load = getattr(target, "weight_loader", default_weight_loader)
            load(target, tensor) if part is None else load(target, tensor, part)
            seen.add(name)
            loaded.add(place)
        missing = {f"model.{name}" for name in weight_names(self.decoder_config)} - seen
        if missing:
            raise ValueError(f"the folder lacks {', '.join(sorted(missing)[:3])}.")
        for recursion in self.model.recursions:
            bars = getattr(recursion.router, "bars", None)
            if bars is not None and torch.finfo(torch.float32).min < bars[0] < torch.inf:
                raise ValueError(f"calibrated to bar={bars[0]:.3g}, {FIRST_STEP}")
        return loaded


def place_of(name: str) -> tuple[str, int | None]:
    """Where a folder's tensor belongs here, and which half of the matrix it is."""
    gated = re.fullmatch(r"(.*\.mlp\.)(gate|up)\.weight", name)
    if gated:
        return f"{gated[1]}gate_up.weight", ("gate", "up").index(gated[2])
    return re.sub(r"norm\.weights\.(\d+)$", r"norm.\1.weight", name), None


def _norms(config: DecoderConfig, count: int, size: int | None = None) -> nn.ModuleList:
    sizes = size or config.hidden_size, config.rms_norm_epsilon
    return nn.ModuleList(RMSNorm(*sizes) for _ in range(count))


@contextmanager
def _in_fp32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
