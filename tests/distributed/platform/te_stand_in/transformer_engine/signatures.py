"""Binds calls against the recorded signatures."""

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_RECORD = json.loads(Path(__file__).with_name("signatures.json").read_text("utf-8"))
VERSION: str = _RECORD["version"]


def recorded(name: str) -> inspect.Signature:
    """The signature of a function of Transformer Engine, without `self`; defaults are their texts."""
    empty = inspect.Parameter.empty
    return inspect.Signature(
        [
            inspect.Parameter(
                row["name"],
                getattr(inspect.Parameter, row["kind"]),
                default=empty if row["default"] is None else row["default"],
            )
            for row in _RECORD[name]
        ]
    )


def bound(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates `method(self, given)`: it is called as `name` is, and gets what was given by name.

    Raises:
        TypeError: a call that Transformer Engine's function would not take.
    """
    signature = recorded(name)

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                arguments = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise TypeError(f"{name} of Transformer Engine {VERSION}: {error}") from None
            for parameter in signature.parameters.values():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    arguments |= arguments.pop(parameter.name, {})
            return method(self, arguments)

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        setattr(  # noqa: B010
            call,
            "__signature__",
            signature.replace(parameters=[own, *signature.parameters.values()]),
        )
        return call

    return decorate
