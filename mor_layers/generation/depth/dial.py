"""The dial of compute: thresholds moved after training."""

from torch import nn

from mor_layers.routers import Thresholds


def turn_dial(model: nn.Module, depth: float = 0.0, width: float = 0.0) -> None:
    """Make a model that plans by thresholds spend less, or more, at inference.

    Training is not affected, and reads the same thresholds as before.

    Args:
        depth: added to the thresholds on logits that a further step must exceed.
        width: added to the thresholds on probabilities that a further expert must exceed.

    Raises:
        ValueError: a shift other than 0 of something that the model has no thresholds for.
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
