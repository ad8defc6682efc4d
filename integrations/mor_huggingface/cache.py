"""MoRCache: a cache for the transformers library that stores the rows of a KV policy.

The library's caches hold one tensor of keys and values per layer, with a row for every token. A
recursion has different rows at every step, so this cache is not filled by `update`. Instead,
`MoRForCausalLM` passes tokens to it. It supports what the generation loops of the library need: its
length, the selection of beams, and the removal of tokens.
"""

from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from mor_layers import MoRTransformer
from mor_layers.generation import IncrementalDecoder


class MoRCache(Cache):
    """Keys and values of a batch of texts. The first tokens determine the batch size.

    Args:
        model: the model whose keys and values it stores, `MoRForCausalLM.model`.
    """

    def __init__(self, model: MoRTransformer) -> None:
        super().__init__(layers=[])
        self.model = model
        self.decoder: IncrementalDecoder | None = None

    def __repr__(self) -> str:
        return f"MoRCache(batch_size={self.batch_size}, length={self.get_seq_length()})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "MoRCache":
        from copy import deepcopy

        copy = MoRCache(self.model)
        copy.decoder = deepcopy(self.decoder, memo)
        return copy

    def extend(
        self, ids: Int[Tensor, "b q"], attention_mask: Int[Tensor, "b sq"] | None
    ) -> Float[Tensor, "b q h"]:
        """Add the next tokens, and return their states after the last norm.

        Args:
            attention_mask: 0 for padding. It covers the cached tokens and the new ones.

        Raises:
            ValueError: the mask has the wrong length, or changes earlier columns.
        """
        past = self.get_seq_length()
        is_token = None if attention_mask is None else self._new_columns(ids, attention_mask, past)
        if self.decoder is None:
            self.decoder = IncrementalDecoder(self.model, len(ids))
        return self.decoder.extend(ids, is_token)

    def _new_columns(self, ids: Tensor, mask: Tensor, past: int) -> Bool[Tensor, "b q"]:
        shape = (len(ids), past + ids.shape[1])
        if mask.shape != shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; with {past} tokens in the cache it "
                f"must be {shape}, for the cached and the new tokens."
            )
        is_token = mask != 0
        if self.decoder is not None and not torch.equal(is_token[:, :past], self.decoder.is_token):
            raise ValueError(
                "attention_mask differs from the previous one for tokens that are in the cache. "
                "Start again without a cache, or do not change these columns."
            )
        return is_token[:, past:]

    @property
    def is_compileable(self) -> bool:
        return False  # the number of tokens that run a step depends on their values

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        return self.decoder is not None

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        return [False]  # an empty list would mean that the cache has no length

    @property
    def is_dummy(self) -> list[bool]:
        return [False]

    @property
    def batch_size(self) -> int:
        return -1 if self.decoder is None else self.decoder.num_texts

    @property
    def num_bytes_in_use(self) -> int:
        """Bytes of the stored keys and values, in whole pages."""
        return 0 if self.decoder is None else self.decoder.caches.num_bytes_in_use

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns so far, including padding."""
        return 0 if self.decoder is None else self.decoder.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.decoder = None

    def reorder_cache(self, beam_idx: Int[Tensor, " b"]) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " b"]) -> None:
        if self.decoder is not None:
            self.decoder.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        texts = torch.arange(max(0, self.batch_size))
        self.batch_select_indices(texts.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        Args:
            tokens_to_remove: number of tokens to remove, as a negative number. The library defines
                it this way.

        Raises:
            ValueError: the number is positive, or there are fewer tokens.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative number."
            )
        if tokens_to_remove and self.decoder is not None:
            self.decoder.cut(self.get_seq_length() + tokens_to_remove)

    def update(self, *arguments: Any, **named: Any) -> NoReturn:
        raise ValueError(
            "a MoRCache takes tokens, not the keys and values of a layer. Pass it to "
            "MoRForCausalLM as `cache`."
        )
