"""Detects whether Transformer Engine is installed."""


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed. If so, Megatron builds its layers from it."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE
