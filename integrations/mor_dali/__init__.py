"""Token batches for pretraining through NVIDIA DALI.

    samples = MegatronSamples(gpt_dataset)
    for batch in token_batches(samples, BatchOrder(end=len(samples), size=8)): ...

Importing this package does not need DALI. Only `token_batches` does.
"""

from mor_dali.order import BatchOrder
from mor_dali.pipeline import INSTALL, Prefetch, is_installed, token_batches
from mor_dali.samples import BatchFields, MegatronSamples, NumpyShards, TokenSamples

__all__ = [
    "INSTALL",
    "BatchFields",
    "BatchOrder",
    "MegatronSamples",
    "NumpyShards",
    "Prefetch",
    "TokenSamples",
    "is_installed",
    "token_batches",
]
