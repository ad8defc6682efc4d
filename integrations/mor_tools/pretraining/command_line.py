"""Parses the command line into `Settings`, and prints the list of all settings."""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mor_layers import RouterConfig, from_mapping
from mor_layers.models import ROPE_SCALINGS, RopeScaling
from mor_layers.routers import registered_routers
from mor_layers.settings import read_yaml, require_shallow
from mor_tools.pretraining.settings import Settings

USAGE = """\
torchrun --nproc-per-node N -m mor_tools.pretraining [--config FILE.yaml] [key=value ...]

Pretrains a GPT with Mixture-of-Recursions and Mixture-of-Experts through Megatron-Core.
Settings come from the file, then from key=value, e.g. training.steps=100 recursion=null.
Run it again to resume from its last checkpoint."""


def load_settings(arguments: Sequence[str]) -> Settings:
    """Read settings from command line arguments; `--help` lists all settings and ends the program.

    Raises:
        ValueError: an argument or a setting is unknown, of the wrong type, or not allowed.
        FileNotFoundError: the configuration file does not exist.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--help", "-h", action="store_true")
    try:
        options, overrides = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}. Usage:\n{USAGE}") from error
    if options.help:
        print(f"{USAGE}\n\n{schema()}")
        raise SystemExit(0)
    for override in overrides:
        if override.startswith("-") or "=" not in override:
            raise ValueError(f"{override!r} is not a key=value setting. Usage:\n{USAGE}")
    settings = read_settings(options.config, overrides)
    settings.require_installed()
    return settings


def read_settings(path: str | None, overrides: Sequence[str]) -> Settings:
    """Read settings from a file, or the defaults, and apply `key=value` overrides.

    Raises:
        ValueError: a setting is unknown, of the wrong type, or not allowed.
        FileNotFoundError: the configuration file does not exist.
    """
    values = _merged(path, overrides)
    _require_text(values)
    return from_mapping(Settings, values, may_import=True)


def _merged(path: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The file's settings with the overrides applied, as plain mappings."""
    if path is not None and not (_is_text(path) and Path(path).is_file()):
        raise FileNotFoundError(
            f"{path} does not exist. Name a YAML file with settings for pretraining."
        )
    try:
        file = OmegaConf.create() if path is None else read_yaml(path)
        if not isinstance(file, DictConfig):
            raise ValueError(f"{path}: expected a mapping of settings.")
        for override in overrides:
            require_shallow(override)
        changes = OmegaConf.from_dotlist(list(overrides))
        for given in (file, changes):
            _require_mappings(Settings, OmegaConf.to_container(given))
        _merge_recursion(file, changes)
        _forget_other_kind(file, changes, "model.rope_scaling", "rope_type")
        return OmegaConf.to_container(OmegaConf.merge(file, changes), resolve=True)  # type: ignore[return-value]
    except RecursionError as error:
        raise ValueError(
            "the settings cannot be read: they are nested too deeply. Leave brackets out."
        ) from error
    except (OmegaConfBaseException, YAMLError, OverflowError, UnicodeError) as error:
        raise ValueError(f"the settings cannot be read: {error}") from error


def _merge_recursion(file: DictConfig, changes: DictConfig) -> None:
    """Merge changes of the recursion, or of single ones such as `recursion.1.num_recursions=3`, into
    those of the file.

    Raises:
        ValueError: the file lists several recursions, and a change does not say which one it means.
    """
    own, given = file.get("recursion"), changes.get("recursion")
    if not isinstance(given, DictConfig):
        if isinstance(given, ListConfig):
            file.pop("recursion", None)  # a list replaces what was there
        return
    if not isinstance(own, ListConfig):
        _replace_router(own, given)
        return
    wrong = [key for key in given if str(key) not in map(str, range(len(own)))]
    if wrong:
        raise ValueError(
            f"recursion.{wrong[0]} is not a setting of {file.recursion!s:.200}, which lists {len(own)} "
            f"recursions. Say which one you mean, e.g. recursion.0.{wrong[0]}=..., or edit the file."
        )
    for number, change in given.items():
        _replace_router(own[int(number)], change)
        own[int(number)] = OmegaConf.merge(own[int(number)], change)
    changes.pop("recursion")


def _replace_router(recursion: Any, changes: Any) -> None:
    """Remove the settings of a recursion's router if the changes are to another type of router."""
    if isinstance(recursion, DictConfig) and isinstance(changes, DictConfig):
        _forget_other_kind(recursion, changes, "router", "type")


def _forget_other_kind(settings: DictConfig, changes: DictConfig, place: str, kind: str) -> None:
    """Remove the settings at a place if the changes are to another kind of them."""
    chosen = OmegaConf.select(changes, f"{place}.{kind}")
    if chosen not in (None, OmegaConf.select(settings, f"{place}.{kind}")):
        OmegaConf.update(settings, place, {}, merge=False)


def _require_mappings(kind: type, values: Any, where: str = "", many: bool = False) -> None:
    """Raise ValueError if there is a list where settings are expected: merging it would fail.

    Args:
        many: whether a list of such settings is allowed.
    """
    if isinstance(values, list):
        if not many:
            raise ValueError(f"{where}={values!r}: expected a mapping of settings, not a list.")
        for index, value in enumerate(values):
            _require_mappings(kind, value, f"{where}[{index}]")
    if not isinstance(values, dict) or kind is RouterConfig:
        return
    hints = typing.get_type_hints(kind)
    for name in set(values) & set(hints):
        component = _component(hints[name])
        if component is not None:
            place = f"{where}.{name}".lstrip(".")
            _require_mappings(component, values[name], place, _may_be_many(hints[name]))


def _require_text(values: Any, where: str = "") -> None:
    """Raise ValueError for characters that can occur neither in file names nor in text for
    tokenizers.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            _require_text(value, f"{where}.{name}".lstrip("."))
    elif isinstance(values, str) and not _is_text(values):
        raise ValueError(
            f"{where}={values!r} contains a character that is not valid text. Leave it out."
        )


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return "\0" not in value


def schema(kind: type = Settings, indent: str = "") -> str:
    """List every setting of the dataclass `kind`, nested ones included: name, type, default and
    meaning.
    """
    return "\n".join(_describe(kind, indent))


def _describe(kind: type, indent: str) -> Iterator[str]:
    documentation, hints = _field_docstrings(kind), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        component = _component(hints[field.name])
        default = "" if component or field.default is dataclasses.MISSING else f" = {_shown(field)}"
        yield f"{indent}{field.name}: {_type_name(hints[field.name])}{default}"
        meaning = documentation.get(field.name) or (inspect.getdoc(component) or "").split("\n")[0]
        yield textwrap.indent(meaning, indent + " " * 8)
        if component is RouterConfig:
            if issubclass(kind, RouterConfig):
                continue  # a router that wraps any of the routers being listed
            for name, router in sorted(registered_routers().items()):
                yield f"{indent}    type: {name}"
                yield from _describe(router, indent + " " * 8)
        elif component is RopeScaling:
            for name, scaling in ROPE_SCALINGS.items():
                yield f"{indent}    rope_type: {name}"
                yield from _describe(scaling, indent + " " * 8)
        elif component:
            yield from _describe(component, indent + " " * 4)


def _component(hint: Any) -> type | None:
    """The dataclass in a type hint such as `MoESettings | None`."""
    return next(filter(dataclasses.is_dataclass, typing.get_args(hint) or (hint,)), None)


def _may_be_many(hint: Any) -> bool:
    """Whether a type hint allows a list of settings, as `A | tuple[A, ...] | None` does."""
    return any(typing.get_origin(argument) is tuple for argument in typing.get_args(hint))


def _type_name(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, arguments))
    if isinstance(hint, types.UnionType):
        return " | ".join("null" if a is type(None) else _type_name(a) for a in arguments)
    if typing.get_origin(hint) is tuple:
        return f"list of {_type_name(arguments[0])}"
    return "mapping" if dataclasses.is_dataclass(hint) else hint.__name__


def _shown(field: dataclasses.Field[Any]) -> str:
    shown = {None: "null", True: "true", False: "false"}
    if isinstance(field.default, bool | None):
        return shown[field.default]
    return repr(field.default) if isinstance(field.default, str) else str(field.default)


def _field_docstrings(kind: type) -> dict[str, str]:
    """The string literal below each field of a dataclass."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            found[statement.target.id] = inspect.cleandoc(ast.literal_eval(following.value))
    return found
