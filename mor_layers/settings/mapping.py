"""Converts YAML and plain mappings to frozen dataclasses of settings, and back.

Settings of an abstract class, such as `RouterConfig`, name their concrete class in the file. The
module that knows these classes registers how they are read and written, see `has_own_form`.
"""

import dataclasses
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mor_layers.settings.field_types import shown
from mor_layers.settings.yaml_files import read_yaml

Read = Callable[[object, str, bool], Any]
"""Makes settings from a value, given its place in the file and whether it may name modules to
import."""
Write = Callable[[Any], dict[str, Any]]
"""Converts settings to plain mappings."""

_FORMS: dict[type, tuple[Read, Write]] = {}


def has_own_form(kind: type, read: Read, write: Write) -> None:
    """Let fields of type `kind` be read by `read`, and settings of its subclasses be written by
    `write`.
    """
    _FORMS[kind] = read, write


def load_config[T](kind: type[T], path: str | Path) -> T:
    """Read settings of `kind` from a YAML file that the user trusts, and resolve interpolations.

    The file may name classes of installed modules (`package.module:ClassName`). They are imported.

    Raises:
        ValueError: a setting is unknown, missing, of the wrong type, or not allowed.
        FileNotFoundError: the file does not exist.
    """
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(read_yaml(path), resolve=True)
    return from_mapping(kind, values, may_import=True)


def from_mapping[T](kind: type[T], values: object, where: str = "", may_import: bool = False) -> T:
    """Make settings of the dataclass `kind` from plain mappings, such as those in YAML.

    Args:
        values: a mapping with the dataclass's fields.
        where: the place in the file, for error messages.
        may_import: whether the values may name modules to import. Pass True only for files that the
            user trusts, because importing a module runs its code.

    Raises:
        ValueError: a setting is unknown, missing, of the wrong type, or not allowed.
    """
    place = where or kind.__name__
    if not isinstance(values, dict):
        raise ValueError(f"{place}: expected a mapping of settings, got {shown(values)}.")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields), key=str)
    if unknown:
        raise ValueError(
            f"{place}: unknown setting {', '.join(map(shown, unknown))}. "
            f"Allowed: {', '.join(sorted(fields)) or 'none'}."
        )
    missing = sorted(
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    )
    if missing:
        raise ValueError(f"{place}: missing setting {', '.join(map(repr, missing))}. Set it.")
    hints = typing.get_type_hints(kind)
    return kind(
        **{
            name: _convert(hints[name], value, f"{where}.{name}" if where else name, may_import)
            for name, value in values.items()
        }
    )


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass of settings as plain mappings and lists, the inverse of `from_mapping`."""
    for kind in type(config).__mro__:
        if kind in _FORMS:
            return _FORMS[kind][1](config)
    return plain_fields(config)


def plain_fields(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as plain mappings and lists, without what `to_mapping` may add."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _convert(hint: Any, value: object, where: str, may_import: bool) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        is_list = isinstance(value, list | tuple)
        fitting = [kind for kind in kinds if (typing.get_origin(kind) is tuple) == is_list]
        return _convert((fitting or kinds)[0], value, where, may_import)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(
                f"{where}={shown(value)}: use one of {', '.join(map(str, arguments))}."
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}={shown(value)}: expected a list.")
        items = enumerate(value)
        return tuple(_convert(arguments[0], v, f"{where}[{i}]", may_import) for i, v in items)
    if hint in _FORMS:
        return _FORMS[hint][0](value, where, may_import)
    if dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, where, may_import)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}={shown(value)}: expected {hint.__name__}.")
    return value
