"""The names that YAML and `config.json` use for routers."""

import importlib
import os
import sys
from importlib.machinery import PathFinder
from inspect import isabstract
from pathlib import Path
from types import ModuleType
from typing import Any

from mor_layers.routers.base import RouterConfig
from mor_layers.settings import from_mapping, has_own_form, plain_fields

_REGISTRY: dict[str, type[RouterConfig]] = {}


def register_router[C: type[RouterConfig]](name: str):
    """Class decorator that makes a `RouterConfig` available in YAML as `router: {type: name, ...}`.

    Raises:
        ValueError: another class already has the name.
    """

    def register(config: C) -> C:
        if _REGISTRY.get(name, config) is not config:
            raise ValueError(
                f"a router named {name!r} is registered already ({_REGISTRY[name].__qualname__}). "
                "Choose another name."
            )
        _REGISTRY[name] = config
        return config

    return register


def registered_routers() -> dict[str, type[RouterConfig]]:
    """The settings classes of all registered routers, by name."""
    return dict(_REGISTRY)


def router_name(config: RouterConfig) -> str:
    """The name of these settings' class in files: registered, or `module:ClassName`.

    Only routers of this library go by their registered name: whoever reads the file may not have
    imported the module that registers another. A class that nobody can import has only its name.
    """
    kind = type(config)
    names = {known: name for name, known in _REGISTRY.items()}
    is_ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    is_importable = kind.__module__ != "__main__" and "." not in kind.__qualname__
    if kind in names and (is_ours or not is_importable):
        return names[kind]
    return _import_path(kind)


def read_router(value: object, where: str, may_import: bool) -> RouterConfig:
    """Read a router's settings from a mapping whose `type` names their class.

    Args:
        value: `type` and the fields of that class.
        where: the place in the file, for error messages.
        may_import: whether `type` may name a class that is not registered. Its module is then
            imported.

    Raises:
        ValueError: the class is unknown or may not be imported, or a setting is not allowed.
    """
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ValueError(f"{where}: expected a mapping with `type`, {_allowed()}; got {value!r}.")
    settings = {name: v for name, v in value.items() if name != "type"}
    kind = _router_class(value["type"], where, may_import)
    return from_mapping(kind, settings, where, may_import)


def write_router(config: RouterConfig) -> dict[str, Any]:
    """The settings as plain values, and the `type` under which `read_router` takes them back."""
    return {**plain_fields(config), "type": router_name(config)}


def _import_path(kind: type[RouterConfig]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _allowed() -> str:
    known = ", ".join(sorted(_REGISTRY))
    return f"one of {known}, or 'package.module:ClassName' of your own"


def _router_class(name: str, where: str, may_import: bool) -> type[RouterConfig]:
    known = _REGISTRY | {_import_path(kind): kind for kind in _REGISTRY.values()}
    if name in known:
        return known[name]
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise ValueError(f"{where}.type={name!r} is not registered. Use {_allowed()}.")
    if not may_import:
        raise ValueError(
            f"{where}.type={name!r} would import the module {module_name!r}, which runs its code. "
            "If you trust where these settings come from, pass trust_remote_code=True (commands: "
            "--trust-remote-code), or import the module and register the router with "
            "register_router beforehand."
        )
    try:
        found = getattr(_imported(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{where}.type={name!r} cannot be imported: {error}. Use {_allowed()}."
        ) from error
    if not (isinstance(found, type) and issubclass(found, RouterConfig)) or isabstract(found):
        raise ValueError(
            f"{where}.type={name!r} must be a subclass of RouterConfig that has `build`."
        )
    return found


def _imported(name: str) -> ModuleType:
    """Import a module, unless it would only be found because it lies in the working folder.

    Python puts the working folder on its path for `python -m` and `python -c`. A file that somebody
    placed there, for example with an archive that was unpacked, must not run because a setting names
    it.
    """
    top = name.partition(".")[0]
    here, named = str(Path.cwd()), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    asked_for = {str(Path(folder).resolve()) for folder in named if folder}
    if top not in sys.modules and here not in asked_for:
        path = [p for p in sys.path if str(Path(p).resolve()) != here]
        if PathFinder.find_spec(top, path) is None and PathFinder.find_spec(top) is not None:
            raise ImportError(
                f"{top} lies in the working folder, which is not searched implicitly; add it to "
                "PYTHONPATH to allow it"
            )
    return importlib.import_module(name)


has_own_form(RouterConfig, read_router, write_router)
