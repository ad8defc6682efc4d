"""Sampling: from logits to the next token of each request.

| module | contents |
|---|---|
| `draws` | temperature, `top_k`, `top_p`, `min_p`, and exact draws that depend on the request alone |
| `penalties` | what changes the logits before: logit bias, and penalties on repetition |
| `constraints` | which tokens a grammar allows |
| `logprobs` | log-probabilities, for clients that ask for them |
"""

from mor_layers.generation.sampling.constraints import Constraint, constrained
from mor_layers.generation.sampling.draws import (
    Sampler,
    Sampling,
    distribution,
    has_distribution,
    sample,
)
from mor_layers.generation.sampling.logprobs import Logprobs, logprobs_of
from mor_layers.generation.sampling.penalties import adjusted

__all__ = [
    "Constraint",
    "Logprobs",
    "Sampler",
    "Sampling",
    "adjusted",
    "constrained",
    "distribution",
    "has_distribution",
    "logprobs_of",
    "sample",
]
