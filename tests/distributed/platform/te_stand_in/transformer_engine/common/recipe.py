"""Recipes: which numbers they are quantized to. Only their settings, nothing is quantized here."""

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Format(Enum):
    E4M3 = "e4m3"
    E5M2 = "e5m2"
    HYBRID = "hybrid"
    E2M1 = "e2m1"


@dataclass
class Recipe:
    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False
    fp8_mha: bool = False


class DelayedScaling(Recipe):
    """Scales from amax histories, which are reduced when the context is left."""

    def __init__(
        self,
        margin: int = 0,
        fp8_format: Format = Format.HYBRID,
        amax_history_len: int = 1024,
        amax_compute_algo: Any = "max",
        reduce_amax: bool = True,
        fp8_dpa: bool = False,
        fp8_mha: bool = False,
        **legacy: Any,
    ) -> None:
        super().__init__(fp8_format, fp8_dpa, fp8_mha)
        self.reduce_amax = reduce_amax


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class MXFP8BlockScaling(Recipe):
    pass


class NVFP4BlockScaling(Recipe):
    pass
