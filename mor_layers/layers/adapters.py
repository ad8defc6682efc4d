"""Adapters that use existing modules as the layers of a recursion.

Legend: `b` batch, `k` tokens that run a step, `h` hidden, `n` heads. States are sequence first.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mor_layers.recursion import StepContext
from mor_layers.selection import Tokens


class PointwiseLayers(nn.Module):
    """Layers that process each token by itself, such as an MLP or a `Sequential` of such layers.

    Args:
        layers: maps `[k b h]` to `[k b h]`, including its residual connection.
    """

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(
        self, hidden: Float[Tensor, "k b h"], context: StepContext
    ) -> Float[Tensor, "k b h"]:
        _require_recursion_wise(context, "PointwiseLayers has no attention")
        return self.layers(hidden)


class EncoderLayers(nn.Module):
    """PyTorch's own bidirectional encoder layers.

    A token attends to every token of its document that runs the step, both earlier and later ones.

    Args:
        layers: run one after another; `batch_first` or not.
    """

    def __init__(self, layers: Iterable[nn.TransformerEncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self, hidden: Float[Tensor, "k b h"], context: StepContext
    ) -> Float[Tensor, "k b h"]:
        _require_recursion_wise(context, "EncoderLayers computes its own keys and values")
        hidden_keys, hidden_pairs = _hidden(context.tokens)
        for layer in self.layers:
            assert isinstance(layer, nn.TransformerEncoderLayer)
            mask = None
            if hidden_pairs is not None:
                mask = hidden_pairs.repeat_interleave(layer.self_attn.num_heads, dim=0)
            batch_first = layer.self_attn.batch_first
            states = hidden.transpose(0, 1) if batch_first else hidden
            states = layer(states, src_mask=mask, src_key_padding_mask=hidden_keys)
            hidden = states.transpose(0, 1) if batch_first else states
        return hidden


def _hidden(tokens: Tokens) -> tuple[Bool[Tensor, "b k"] | None, Bool[Tensor, "b k k"] | None]:
    """True for what attention must not see: keys or, with several documents, query-key pairs.

    Every query keeps at least one key, because softmax would otherwise give nan.
    """
    padding = None if tokens.is_padding is None else tokens.is_padding.T  # [k b] -> [b k]
    if tokens.documents is None:
        if padding is None:
            return None, None
        return padding & ~padding.all(dim=1, keepdim=True), None
    documents = tokens.documents.T
    pairs = documents[:, :, None] != documents[:, None, :]
    if padding is not None:
        pairs = pairs | padding[:, None, :]
    return None, pairs & ~torch.eye(len(tokens.positions), dtype=torch.bool, device=pairs.device)


def _require_recursion_wise(context: StepContext, reason: str) -> None:
    if type(context) is not StepContext:
        raise ValueError(
            f"{reason}, so its recursion cannot share keys and values between steps "
            f"({type(context).__name__}). Use kv_policy='recursion_wise'."
        )
