"""Reads DeepSeek-V2 and DeepSeek-V3 checkpoints, and writes models of ours as such checkpoints.

Their attention is our `latent_attention`. The first layers have a dense MLP and the others experts, so
that a checkpoint with experts is a model of ours whose prelude is dense (`dense_ends`) and whose block
runs once. V2 (arXiv 2405.04434) scores experts by softmax and does not normalise gates; V3 (arXiv
2412.19437) scores them by sigmoid, chooses them by score plus bias, and normalises gates. Moonlight is a
V3. Config and tensors are those of transformers' `deepseek_v2` and `deepseek_v3`. Layers of multi-token
prediction, which V3 has after its last one, are our heads, and weights in FP8 are read as bfloat16.
"""

from mor_huggingface.checkpoints.deepseek.folder import MOST_HEADS, open_deepseek, write_deepseek
from mor_huggingface.checkpoints.deepseek.names import deepseek_names
from mor_huggingface.checkpoints.deepseek.settings import (
    FAMILIES,
    LATENT_EPSILON,
    V2,
    V3,
    Family,
    config_from_deepseek,
    deepseek_config,
)

__all__ = [
    "FAMILIES",
    "LATENT_EPSILON",
    "MOST_HEADS",
    "V2",
    "V3",
    "Family",
    "config_from_deepseek",
    "deepseek_config",
    "deepseek_names",
    "open_deepseek",
    "write_deepseek",
]
