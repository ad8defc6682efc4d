"""Checks that the values of settings have the annotated types.

Values from YAML are checked when they are read (`mor_layers.from_mapping`). This module is for direct
calls of constructors, where `num_recursions="3"` or `qk_norm="false"` would otherwise go unnoticed.
"""

import dataclasses
import reprlib
import types
import typing
from functools import cache
from typing import Any

_SHORTENED = reprlib.Repr(
    maxlevel=6, maxlist=20, maxtuple=20, maxdict=8, maxstring=200, maxlong=100, maxother=200
)


def shown(value: object) -> str:
    """A value as error messages show it: its `repr`, shortened if nobody would read it to the end."""
    return _SHORTENED.repr(value)


def check_types(config: object) -> None:
    """Raise ValueError if a field of a dataclass has a value of another type than annotated.

    An int is accepted as a float; a bool is neither. Choices (`Literal`) are not checked here: the
    settings classes check their own.
    """
    kind = type(config)
    for name, hint in _hints(kind).items():
        value = getattr(config, name)
        if not _fits(value, hint):
            raise ValueError(
                f"{kind.__name__}.{name}={shown(value)} has the wrong type. Use {_described(hint)}."
            )


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, arguments[0]) for v in value)
    if not isinstance(hint, type):
        return True
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _described(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_described, arguments))
    if origin is tuple:
        return f"a tuple of {_described(arguments[0])}"
    if origin is typing.Literal:
        return ", ".join(map(repr, arguments))
    return "None" if hint is types.NoneType else hint.__name__
