"""Rotary frequencies that are changed so that a model reads longer texts than it was first trained on.

Every kind lowers the frequencies of RoPE whose period is long, which brings the angles of late
positions back into the range that the model has seen. The arithmetic is that of transformers'
`modeling_rope_utils`, whose names the fields have.

Legend: `f` frequencies, half of the rotated numbers of a head.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mor_layers.settings import check_types, from_mapping, has_own_form, plain_fields
from mor_layers.settings.field_types import shown


@dataclass(frozen=True)
class RopeScaling(ABC):
    """How the frequencies of RoPE are changed, and the size of queries and keys with them."""

    factor: float
    """How many times longer the texts become. At least 1."""

    def __post_init__(self) -> None:
        check_types(self)
        self._require_positive("factor")
        if self.factor < 1:
            raise ValueError(f"{self._name}.factor={self.factor} must be at least 1.")

    @abstractmethod
    def scale(self, frequencies: Float[Tensor, " f"], base: float) -> Float[Tensor, " f"]:
        """The changed frequencies, in radians per token, highest first."""

    @property
    def concentration(self) -> float:
        """What rotated queries and keys are multiplied by."""
        return 1.0

    @property
    def latent_softmax_factor(self) -> float:
        """What multi-latent attention multiplies its scores by, beside `concentration`."""
        return 1.0

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{self._name}.{name}={value} must be above 0, and finite.")


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """All frequencies are divided by the factor (Chen et al. 2023, arXiv 2306.15595)."""

    def scale(self, frequencies: Float[Tensor, " f"], base: float) -> Float[Tensor, " f"]:
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Low frequencies are divided by the factor, high ones are kept, and those between change over
    smoothly, as in Llama 3.1 (arXiv 2407.21783)."""

    original_max_position_embeddings: int
    """Length of the texts that the model was first trained on, in tokens."""
    low_freq_factor: float = 1.0
    """Frequencies that turn fewer times than this in a text of the original length are divided."""
    high_freq_factor: float = 4.0
    """Frequencies that turn more often than this are kept. Above `low_freq_factor`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("original_max_position_embeddings", "low_freq_factor")
        if not self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"{self._name}.high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}, and finite."
            )

    def scale(self, frequencies: Float[Tensor, " f"], base: float) -> Float[Tensor, " f"]:
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (Peng et al. 2023, arXiv 2309.00071), as Qwen and DeepSeek use it.

    Low frequencies are divided by the factor, high ones are kept, with a linear ramp over the numbers
    of a head between. Scores of attention grow with the logarithm of the factor: by `concentration`
    of rotated numbers, or, in DeepSeek's latent attention, of whole heads.
    """

    original_max_position_embeddings: int
    """Length of the texts that the model was first trained on, in tokens."""
    beta_fast: float = 32.0
    """Frequencies that turn more often than this in a text of the original length are kept."""
    beta_slow: float = 1.0
    """Frequencies that turn fewer times are divided. Below `beta_fast`."""
    mscale: float | None = None
    """With `mscale_all_dim`: weight of the logarithm in the numerator of `concentration`, above 0."""
    mscale_all_dim: float | None = None
    """Weight of the logarithm in what latent attention multiplies all its scores by, and in the
    denominator of `concentration`. None or 0: neither is there."""
    attention_factor: float | None = None
    """Sets `concentration`, which otherwise follows from the factor and the two fields above."""
    truncate: bool = True
    """Whether the ramp begins and ends at whole pairs of numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive(
            "original_max_position_embeddings", "beta_slow", "mscale", "attention_factor"
        )
        if not self.beta_slow < self.beta_fast < math.inf:
            raise ValueError(
                f"{self._name}.beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}, and "
                "finite."
            )
        if not 0 <= (self.mscale_all_dim or 0) < math.inf:
            raise ValueError(
                f"{self._name}.mscale_all_dim={self.mscale_all_dim} must be 0 or more, and finite."
            )

    def scale(self, frequencies: Float[Tensor, " f"], base: float) -> Float[Tensor, " f"]:
        first, last = self._ramp(2 * len(frequencies), base)
        pairs = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
        divided = ((pairs - first) / (last - first)).clamp(0, 1)
        return divided * frequencies / self.factor + (1 - divided) * frequencies

    @property
    def concentration(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    @property
    def latent_softmax_factor(self) -> float:
        return self._growth(self.mscale_all_dim or 0.0) ** 2

    def _growth(self, weight: float) -> float:
        """How much larger queries and keys become, each."""
        return 0.1 * weight * math.log(self.factor) + 1.0

    def _ramp(self, rotary_size: int, base: float) -> tuple[float, float]:
        """The pairs of numbers at which the frequencies begin to change, and are divided in full."""

        def pair(turns: float) -> float:
            """The pair that turns so many times in a text of the original length."""
            turned = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return rotary_size * math.log(turned) / (2 * math.log(base))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotary_size - 1)
        return first, last if last != first else last + 0.001  # one pair: no division by zero


ROPE_SCALINGS: dict[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}
"""The kinds, by their name in config.json of transformers and in our settings."""


def read_rope_scaling(value: object, where: str, may_import: bool = False) -> RopeScaling:
    """The scaling from a mapping with `rope_type` and the fields of that class.

    Raises:
        ValueError: the kind is unknown, or a setting is not allowed.
    """
    kind = value.get("rope_type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        raise ValueError(
            f"{where}: expected a mapping with rope_type, one of {', '.join(ROPE_SCALINGS)}; got "
            f"{shown(value)}."
        )
    fields = {name: given for name, given in value.items() if name != "rope_type"}
    return from_mapping(ROPE_SCALINGS[kind], fields, where, may_import)


def write_rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """The inverse of `read_rope_scaling`."""
    names = {kind: name for name, kind in ROPE_SCALINGS.items()}
    return {"rope_type": names[type(scaling)], **plain_fields(scaling)}


has_own_form(RopeScaling, read_rope_scaling, write_rope_scaling)
