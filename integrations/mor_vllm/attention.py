"""Attention of a layer that runs at several depths, built on vLLM's `Attention`.

The layer has one `Attention` per step, each with the name and the cache of its own unrolled depth.
Under `recursive_sharing`, those of later steps have no cache: they name step 1's as the target of
vLLM's cross-layer sharing.

vLLM attends to all rows of a cache up to a token's own row. A row that must not be seen, because
its token had exited, is hidden by one additional number in each head: `QUERY_MARK` in all queries,
0 in visible keys and `HIDDEN_KEY` in hidden ones. The scores of hidden rows are so far below all
others that the softmax gives them a weight of exactly 0.

Legend: `t` tokens of a batch, from any requests; `h` hidden, `n` query heads and `g` key-value
heads of this rank, `d` head size, `w` head size in the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size  # type: ignore[import-not-found]
from vllm.model_executor.layers.attention import Attention  # type: ignore[import-not-found]
from vllm.model_executor.layers.layernorm import RMSNorm  # type: ignore[import-not-found]
from vllm.model_executor.layers.rotary_embedding import get_rope  # type: ignore[import-not-found]

from mor_layers import DecoderConfig, StepContext
from mor_layers.models import YarnScaling, write_rope_scaling
from mor_vllm.plugin import cached_head_size, hides_rows
from mor_vllm.projections import StepProjection

KeysAndValues = dict[int, tuple[Tensor, Tensor]]
"""The keys and values of step 1 that later steps share, by layer of the block."""

# Their product times the softmax scale is at least 1e4 for head sizes up to 512, whereas exp(-104)
# is already 0 in fp32. Both are exact in bf16 and fp16.
QUERY_MARK = 1024.0
HIDDEN_KEY = -256.0


@dataclass(frozen=True)
class ServedStep(StepContext):
    """The context of a step on a batch of vLLM, whose attention determines by itself which rows a
    token sees.
    """

    first: KeysAndValues = field(default_factory=dict)
    """Filled at step 1 and read at later steps of the same block."""
    kept: Float[Tensor, "t h"] | None = None
    """Under `exit_state`, if some tokens may have exited: the states that those keep."""

    @property
    def positions(self) -> Int[Tensor, " t"]:
        return self.tokens.positions[0]  # [1 t] -> [t]

    @property
    def has_exited(self) -> Bool[Tensor, "t 1"] | None:
        """The tokens that do not run this step; None if all run it."""
        is_padding = self.tokens.is_padding
        return None if is_padding is None else is_padding[0, :, None]

    def with_kept(self, hidden: Float[Tensor, "t h"]) -> Float[Tensor, "t h"]:
        """A layer's input, with the states of exited tokens replaced by those that they keep."""
        if self.kept is None or self.has_exited is None:
            return hidden
        return torch.where(self.has_exited, self.kept, hidden)


class StepAttention(nn.Module):
    """Attention of one layer that runs at several depths."""

    def __init__(self, config: DecoderConfig, depths: Sequence[int], vllm_config: Any) -> None:
        super().__init__()
        size, ranks = config.head_size, get_tensor_model_parallel_world_size()
        policy = config.effective_recursion.kv_policy
        self.head_size = size
        # Outside the recursion no row is hidden, but vLLM allocates memory best to layers of equal
        # head size.
        self.hides = hides_rows(config)
        self.cached_size = cached_head_size(size + self.hides)
        self.shares, self.updates = policy == "recursive_sharing", policy == "sharing_with_update"
        h, bias, num_steps = config.hidden_size, config.qkv_bias, len(depths)
        width, kv_width = config.num_heads * size, config.kv_heads * size
        self.query = StepProjection(["query"], h, [width], config, num_steps, bias)
        self.key = StepProjection(["key"], h, [kv_width], config, num_steps, bias)
        self.value = StepProjection(["value"], h, [kv_width], config, num_steps, bias)
        self.output = StepProjection(["output"], width, [h], config, num_steps)
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            is_own = "attention" in config.effective_recursion.own_per_step
            count = num_steps if is_own else 1
            self.query_norm, self.key_norm = (norms(config, count, size) for _ in range(2))
        longest = vllm_config.model_config.max_model_len
        self.rotary = get_rope(
            size, max_position=longest, rope_parameters=rope_parameters(config, longest)
        )
        # vLLM reads a layer's number from the only number in its name: the index in the unrolled
        # model.
        names = [f"model.layers.{depth}.self_attn.attn" for depth in depths]
        self.steps = nn.ModuleList(
            Attention(
                config.num_heads // ranks,
                self.cached_size,
                size**-0.5,
                num_kv_heads=config.kv_heads // ranks,
                cache_config=vllm_config.cache_config,
                prefix=name,
                kv_sharing_target_layer_name=names[0] if self.shares and index else None,
            )
            for index, name in enumerate(names)
        )

    def forward(
        self, hidden: Float[Tensor, "t h"], context: ServedStep, layer: int
    ) -> Float[Tensor, "t h"]:
        step = context.step
        query = self._heads(self.query(hidden, step), step, self.query_norm)
        if self.shares and step:
            query, _ = self.rotary(context.positions, query, None)
            key, value = context.first[layer]  # for backends that read a prompt's rows from here
        else:
            key = self._heads(self.key(hidden, step), step, self.key_norm)
            query, key = self.rotary(context.positions, query, key)
            key = self._widened(key, self._marks(context))
            value = self._widened(self.value(hidden, step))
            key, value = self._exchanged(key, value, context, layer)
        query = self._widened(query, QUERY_MARK)
        attended = self.steps[step](query, key, value)
        return self.output(self._narrowed(attended), step)

    def _exchanged(
        self, key: Tensor, value: Tensor, context: ServedStep, layer: int
    ) -> tuple[Tensor, Tensor]:
        """The keys and values to write to the cache of the step; those of step 1 are kept for steps
        that share them.
        """
        if context.step == 0:
            context.first[layer] = key, value
        elif self.updates and context.has_exited is not None:
            first_key, first_value = context.first[layer]
            key = torch.where(context.has_exited, first_key, key)
            value = torch.where(context.has_exited, first_value, value)
        return key, value

    def _heads(
        self, values: Float[Tensor, "t nd"], step: int, norm: nn.ModuleList | None
    ) -> Float[Tensor, "t nd"]:
        if norm is None:
            return values
        return of_step(norm, step)(values.unflatten(-1, (-1, self.head_size))).flatten(-2)

    def _marks(self, context: ServedStep) -> Tensor | float:
        exited = context.has_exited
        return 0.0 if exited is None else HIDDEN_KEY * exited

    def _widened(
        self, values: Float[Tensor, "t nd"], mark: Tensor | float = 0.0
    ) -> Float[Tensor, "t nw"]:
        """Heads padded to the head size of the cache: the first additional number is `mark`, the
        others are 0.
        """
        if self.cached_size == self.head_size:
            return values
        heads = values.unflatten(-1, (-1, self.head_size))
        heads = F.pad(heads, (0, self.cached_size - self.head_size))
        if self.hides:
            heads[..., self.head_size] = mark
        return heads.flatten(-2)

    def _narrowed(self, values: Float[Tensor, "t nw"]) -> Float[Tensor, "t nd"]:
        if self.cached_size == self.head_size:
            return values
        return values.unflatten(-1, (-1, self.cached_size))[..., : self.head_size].flatten(-2)


def rope_parameters(config: DecoderConfig, longest: int) -> dict[str, Any]:
    """The rotary embedding in vLLM's terms, which are those of transformers.

    Args:
        longest: length of the longest sequence that is served.

    Raises:
        ValueError: with YaRN, it is longer than vLLM's table of rotations, which is not checked when it
            is read.
    """
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    scaling = config.rope_scaling
    if isinstance(scaling, YarnScaling):
        reach = int(scaling.factor * scaling.original_max_position_embeddings)
        if longest > reach:
            raise ValueError(
                f"max_model_len={longest} cannot be served by vLLM with rope_scaling={scaling}, which "
                f"reaches {reach} tokens. Start the server with --max-model-len {reach}, or less."
            )
    if scaling is not None:
        given = write_rope_scaling(scaling)
        values |= {name: value for name, value in given.items() if value is not None}
    return values


def norms(config: DecoderConfig, count: int, size: int | None = None) -> nn.ModuleList:
    """One RMSNorm for all steps, or one per step."""
    sizes = size or config.hidden_size, config.rms_norm_epsilon
    return nn.ModuleList(RMSNorm(*sizes) for _ in range(count))


def of_step(modules: nn.ModuleList, step: int) -> nn.Module:
    """The module of a step; the only one, if the steps share it."""
    return modules[step if len(modules) > 1 else 0]
