"""Settings: frozen dataclasses, their checks, and YAML."""

from mor_layers.settings.checks import require_choice, require_not_negative, require_positive
from mor_layers.settings.field_types import check_types
from mor_layers.settings.mapping import (
    from_mapping,
    has_own_form,
    load_config,
    plain_fields,
    to_mapping,
)
from mor_layers.settings.yaml_files import read_yaml, require_shallow

__all__ = [
    "check_types",
    "from_mapping",
    "has_own_form",
    "load_config",
    "plain_fields",
    "read_yaml",
    "require_choice",
    "require_not_negative",
    "require_positive",
    "require_shallow",
    "to_mapping",
]
