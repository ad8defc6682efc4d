"""Checks that two stored models compute the same logits on a few random tokens.

Each model is opened from its files: models of the transformers library through it, all others as a
MoRTransformer, routed as in generation. Only one of them is in memory at a time, in fp32.

Legend: `b` batch, `s` sequence, `v` vocabulary.
"""

import math
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mor_layers import MoRTransformer
from mor_layers.weights import StoredModel, state_of

TOLERANCE = 1e-4
"""Largest allowed difference, relative to the largest logit."""


def probe(vocab_size: int) -> Int[Tensor, "b s"]:
    """The token ids, which are always the same, `[b s]`."""
    return torch.randint(vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(stored: StoredModel, ids: Int[Tensor, "b s"]) -> Float[Tensor, "b s v"]:
    """Logits computed by our own layers, `[b s v]`."""
    with torch.device("meta"):
        model = MoRTransformer(stored.config)
    weights = {}
    for name, tensor in stored.weights.items():
        weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    model.load_state_dict(state_of(stored.config, weights), assign=True)
    return model.eval()(ids, causal_routing=True).logits


@torch.no_grad()
def logits_by_transformers(folder: Path, ids: Int[Tensor, "b s"]) -> Float[Tensor, "b s v"]:
    """Logits computed by the transformers library, `[b s v]`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(ids).logits


def difference(expected: Tensor, found: Tensor) -> float:
    """The largest absolute difference of two sets of logits.

    Raises:
        ValueError: it is larger than rounding errors.
    """
    if expected.shape != found.shape:
        raise ValueError(
            f"logits of shape {tuple(found.shape)} instead of {tuple(expected.shape)}: the written "
            "model is a different one. Nothing was kept."
        )
    largest = (expected - found).abs().max().item()
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    if math.isnan(largest) or largest > allowed:
        raise ValueError(
            f"the written model computes other logits: the largest difference is {largest:.2g}, "
            f"but rounding explains at most {allowed:.2g}. Nothing was kept."
        )
    return largest
