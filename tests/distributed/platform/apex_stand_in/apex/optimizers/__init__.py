from apex.optimizers.fused_adam import FusedAdam


class FusedSGD:
    """Megatron imports it."""


__all__ = ["FusedAdam", "FusedSGD"]
