"""Changes to the depth of a trained model: calibration, the dial, additional steps, early exit."""

from mor_layers.generation.depth.calibration import Calibration, calibrate
from mor_layers.generation.depth.deepening import deepened
from mor_layers.generation.depth.dial import turn_dial
from mor_layers.generation.depth.early_exit import with_early_exit

__all__ = ["Calibration", "calibrate", "deepened", "turn_dial", "with_early_exit"]
