"""Training a recursive model from a dense one: distillation and healing."""

from mor_layers.training.distillation import Distillation, DistilledOutput, Distiller
from mor_layers.training.healing import Batch, Healing, heal

__all__ = ["Batch", "Distillation", "DistilledOutput", "Distiller", "Healing", "heal"]
