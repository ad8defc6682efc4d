"""The layers of a Hugging Face decoder as the shared block of a recursion, without converting them.

    python examples/huggingface_layers.py [number of steps]

Wraps the middle of a small random Llama and trains it on text. `RecursiveLM` takes a pretrained Llama,
Mistral, Qwen2 or Qwen3 the same way: AutoModelForCausalLM.from_pretrained(...).
"""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from custom_router import text_batches
from mor_layers import (
    ExpertChoice,
    RecursionBlock,
    RecursionOutput,
    RouterConfig,
    StepContext,
    Tokens,
)
from mor_layers.recursion import KVPolicy

ATTENTION = ("sdpa", "eager")
"""Implementations that take the mask of a step."""


class HuggingFaceLayers(nn.Module):
    """Decoder layers of transformers as they are, for `RecursionBlock`.

    A layer is told where the selected tokens stand, so that RoPE turns by original positions, and
    what they may see. Keys and values of the KV policy reach it in the place of its cache.

    Args:
        layers: share the call of `LlamaDecoderLayer`. Their weights may be frozen, quantized or
            adapted: nothing here looks inside.
        rotary: the model's own, with its RoPE scaling.

    Raises:
        ValueError: no layers, or an attention that this hands no mask to.
    """

    def __init__(self, layers: Iterable[nn.Module], rotary: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.rotary = rotary
        if not self.layers:
            raise ValueError("layers is empty; a recursion needs one layer at least.")
        attention = [cast(Any, layer).self_attn for layer in self.layers]
        for index, own in enumerate(attention):
            name = own.config._attn_implementation
            if name not in ATTENTION:
                raise ValueError(
                    f"layer {index} has attn_implementation={name!r}; expected one of {ATTENTION}. "
                    "Load the model with attn_implementation='sdpa'."
                )
            # Some layers know their window, those of Mistral look it up in their settings.
            window = getattr(own, "sliding_window", getattr(own.config, "sliding_window", None))
            if window is not None:
                raise ValueError(
                    f"layer {index} attends within sliding_window={window}, which a "
                    "step does not keep to. Use a model without, or set it to None."
                )

    def forward(
        self, hidden: Float[Tensor, "k b h"], context: StepContext
    ) -> Float[Tensor, "k b h"]:
        """Run the step.

        Raises:
            ValueError: `kv_policy='exit_state'`, which projects keys of tokens that run no layer.
        """
        if context.exited is not None:
            raise ValueError(
                "kv_policy='exit_state' needs keys of tokens that do not run the layers, which "
                "those of transformers cannot give. Use another kv_policy."
            )
        states = hidden.transpose(0, 1)  # [k b h] -> [b k h]
        positions = context.tokens.positions.T
        rotary = self.rotary(states, position_ids=positions)
        for index, layer in enumerate(self.layers):
            attention = cast(Any, layer).self_attn
            states = layer(
                states,
                attention_mask=_mask(context, attention.config._attn_implementation, states.dtype),
                position_ids=positions,
                cache=_StepKeys(context, index),
                position_embeddings=rotary,
            )
        return states.transpose(0, 1)


class _StepKeys:
    """What a layer takes for its cache: hands over keys and values, gives those of the policy."""

    def __init__(self, context: StepContext, layer: int) -> None:
        self.context, self.layer = context, layer

    def update(
        self,
        key: Float[Tensor, "b g k d"],
        value: Float[Tensor, "b g k d"],
        layer_idx: int,
        **options: Any,
    ) -> tuple[Float[Tensor, "b g m d"], Float[Tensor, "b g m d"]]:
        """`layer_idx` is the layer's place in the model it came from; ours is that in the block."""
        own = (key, value) if self.context.projects_keys else (None, None)
        rows = [part if part is None else part.permute(2, 0, 1, 3) for part in own]
        keys, values = self.context.exchange(self.layer, *rows)
        return keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)


def _mask(context: StepContext, attention: str, dtype: torch.dtype) -> Tensor | None:
    """The step's mask in the form that an attention of transformers takes."""
    mask = context.causal_mask
    if attention == "sdpa":
        return mask  # None says plainly causal
    if mask is None:
        size = context.tokens.shape[0]
        mask = torch.ones(size, size, dtype=torch.bool, device=context.tokens.positions.device)
        mask = mask.tril()[None, None]
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(dtype).min
    )


class RecursiveLM(nn.Module):
    """A causal language model of transformers whose middle layers recur. It keeps their weights.

    Args:
        model: anything in the layout of `LlamaForCausalLM`.
        router: who goes on.
        num_recursions: passes through the shared layers.
        prelude, coda: layers before and after them that run once, as they did.
        kv_policy: any but `exit_state`.

    Raises:
        ValueError: prelude and coda leave no layer to share.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        router: RouterConfig,
        num_recursions: int,
        prelude: int = 1,
        coda: int = 1,
        kv_policy: KVPolicy = "recursion_wise",
    ) -> None:
        super().__init__()
        base = cast(Any, model).model
        layers, rotary, width = list(base.layers), base.rotary_emb, model.config.hidden_size
        end = len(layers) - coda
        if min(prelude, coda) < 0 or prelude >= end:
            raise ValueError(
                f"prelude={prelude} and coda={coda} leave none of the {len(layers)} layers to "
                f"share. Their sum must be at most {len(layers) - 1}, neither below 0."
            )
        self.embedding, self.norm = base.embed_tokens, base.norm
        self.output = cast(Any, model).lm_head
        self.prelude, self.coda = (
            HuggingFaceLayers(part, rotary) if part else None
            for part in (layers[:prelude], layers[end:])
        )
        self.recursion = RecursionBlock(
            HuggingFaceLayers(layers[prelude:end], rotary),
            router.build(width, num_recursions).to(self.embedding.weight),
            kv_policy,
        )

    def forward(
        self, ids: Int[Tensor, "b s"], is_padding: Tensor | None = None
    ) -> tuple[Float[Tensor, "b s v"], RecursionOutput]:
        """Logits of the next tokens, and who ran each step."""
        padding = None if is_padding is None else is_padding.T
        tokens = Tokens.whole_sequence(*ids.T.shape, ids.device, is_padding=padding)
        hidden = self.embedding(ids.T)
        if self.prelude is not None:
            hidden = self.prelude(hidden, StepContext(0, tokens))
        output = self.recursion(hidden, tokens)
        hidden = output.hidden
        if self.coda is not None:
            hidden = self.coda(hidden, StepContext(0, tokens))
        return self.output(self.norm(hidden)).transpose(0, 1), output


def small_llama() -> LlamaForCausalLM:
    """Four layers with random weights over bytes."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def train(model: RecursiveLM, steps: int) -> Iterator[tuple[float, RecursionOutput]]:
    """Train on random passages; yields nats per byte and who ran each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _, ids in zip(range(steps), text_batches(), strict=False):
        logits, output = model(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        sum(output.losses.values(), loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), output


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("steps", type=int, nargs="?", default=100, help="(default: 100)")
    steps = options.parse_args().steps
    torch.manual_seed(0)
    model = RecursiveLM(small_llama(), ExpertChoice(), num_recursions=3)
    for i, (loss, output) in enumerate(train(model, steps), start=1):
        if i == 1 or i % 20 == 0:
            shares = ((output.depths > step).float().mean().item() for step in range(3))
            per_step = "  ".join(f"{share:4.0%}" for share in shares)
            print(f"step {i:4}  loss {loss:.3f}  tokens that ran each step {per_step}")


if __name__ == "__main__":
    main()
