"""The compute dial: shifts the thresholds of a trained model."""

from torch import nn

from mor_layers.routers import Thresholds


def turn_dial(model: nn.Module, depth: float = 0.0, width: float = 0.0) -> None:
    """Make a model that plans by thresholds use less or more compute at inference.

    Training is not affected and uses the thresholds without the shift.

    Args:
        depth: added to the thresholds that a logit must exceed for another step.
        width: added to the thresholds that a probability must exceed for another expert.

    Raises:
        ValueError: a shift is not 0 but the model has no such thresholds.
    """
    found = [module for module in model.modules() if isinstance(module, Thresholds)]
    for dial, shift in (("depth", depth), ("width", width)):
        own = [thresholds for thresholds in found if thresholds.dial == dial]
        if shift and not own:
            raise ValueError(
                f"{dial}={shift}: the model has no thresholds over {dial}. Train it with router "
                "DepthAndWidth" + (" and mean_experts." if dial == "width" else ".")
            )
        for thresholds in own:
            thresholds.shift = shift
