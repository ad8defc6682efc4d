"""A stand-in for Transformer Engine on a machine without a GPU, for tests only.

It takes what the real one takes and refuses what that refuses: every call is bound against the
signatures recorded from its sources (`signatures.json`, which names the version), and shapes, dtypes,
formats and mask types are checked by its rules. Arithmetic is plain PyTorch, in the input's precision,
under a quantization context too. Calls of attention and entries of quantization contexts are recorded
in `calls`. Put this folder's parent on the search path before Megatron is imported.
"""

from transformer_engine.signatures import VERSION

__version__ = VERSION

from transformer_engine import common, pytorch

__all__ = ["__version__", "common", "pytorch"]
