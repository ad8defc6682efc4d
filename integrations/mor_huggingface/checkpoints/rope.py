"""The rotary position embedding in a config.json of transformers."""

from collections.abc import Mapping
from typing import Any

from mor_layers.models import (
    ROPE_SCALINGS,
    DecoderConfig,
    RopeScaling,
    read_rope_scaling,
    write_rope_scaling,
)
from mor_layers.settings.field_types import shown

_LENGTH, _ORIGINAL_LENGTH = "max_position_embeddings", "original_max_position_embeddings"


def read_rope(values: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters`, or from the `rope_theta` and `rope_scaling` of files
    that transformers before version 5 wrote.

    Raises:
        ValueError: a setting is not supported or has the wrong type.
    """
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    given = values.get(name) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: {name}={shown(given)}: expected a mapping.")
    base = given.get("rope_theta", values.get("rope_theta", 10000.0))
    if not isinstance(base, int | float):
        raise ValueError(f"{where}: rope_theta={shown(base)} must be a number.")
    part = given.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise ValueError(f"{where}: partial_rotary_factor={shown(part)} is not supported, only 1.")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return float(base), None
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        raise ValueError(
            f"{where}: rope_type={shown(kind)} is not supported, only 'default', "
            f"{', '.join(map(repr, ROPE_SCALINGS))}."
        )
    apart = ("rope_theta", "partial_rotary_factor", "type", "rope_type")
    fields = {n: v for n, v in given.items() if n not in apart and v is not None}
    if kind != "linear":
        fields |= _original_length(values, fields)
        ratio = _ratio(values.get(_LENGTH), fields.get(_ORIGINAL_LENGTH))
        if kind == "yarn" and "factor" not in fields and ratio is not None:
            fields["factor"] = ratio
    scaling = read_rope_scaling({"rope_type": kind, **fields}, f"{where}: {name}")
    return float(base), scaling


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """The entry `rope_parameters` for a model's rotary embedding."""
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scaling is not None:
        fields = write_rope_scaling(config.rope_scaling)
        if fields.get("truncate"):
            del fields["truncate"]  # the default, which few readers know
        values |= {name: value for name, value in fields.items() if value is not None}
    return {"rope_parameters": values}


def _original_length(values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The length of the first training, where transformers looks for it."""
    for place in (values.get(_ORIGINAL_LENGTH), fields.get(_ORIGINAL_LENGTH), values.get(_LENGTH)):
        if place is not None:
            return {_ORIGINAL_LENGTH: place}
    return {}


def _ratio(length: object, original: object) -> float | None:
    if isinstance(length, int) and isinstance(original, int) and original > 0:
        return length / original
    return None
