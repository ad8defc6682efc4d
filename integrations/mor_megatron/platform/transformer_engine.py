"""Whether Transformer Engine is installed."""


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed, which Megatron then builds its layers from."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE
