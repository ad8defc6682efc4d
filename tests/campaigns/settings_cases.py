"""Settings of the pretraining script, on the command line and in files."""

import json
import random
import typing
from pathlib import Path
from typing import Any

from mor_layers import from_mapping, to_mapping
from mor_layers.routers import registered_routers
from mor_tools.pretraining.command_line import load_settings
from mor_tools.pretraining.models import build, sizes
from mor_tools.pretraining.settings import Settings
from tests.campaigns import hostile
from tests.mor_tools.pretraining.runs import SMALL, TINY
from tests.mor_tools.pretraining.settings.random_settings import LEFT_OUT, leaves

HINTS = leaves()
NAMES = sorted({*HINTS, *LEFT_OUT, "model", "model.moe", "recursion", "data", "training"})


def command_line(source: random.Random, folder: Path) -> str | None:
    """A few overrides of the small run, of which most are hostile."""
    given = []
    for name in source.choices(NAMES, k=source.choice([1, 1, 2, 4])):
        if name == "recursion.router" and source.random() < 0.7:
            name, kind = f"{name}.type", source.choice(sorted(registered_routers()))
            given.append(f"{name}={kind}")
        else:
            wanted = _typed(HINTS.get(name), source) if source.random() < 0.6 else None
            wanted = hostile.value(source) if wanted is None else wanted
            given.append(f"{name}={_written(wanted, source)}")
    return _answer(["--config", TINY, *SMALL, *given], given)


def file(source: random.Random, folder: Path) -> str | None:
    """A configuration file in which one place is hostile, or whose bytes are damaged."""
    path = folder / "settings.yaml"
    content = Path(TINY).read_bytes()
    if source.random() < 0.5:
        mapping = to_mapping(load_settings(["--config", TINY]))
        content = hostile.as_json(hostile.changed(source, mapping))
    else:
        content = hostile.damaged(source, content)
    path.write_bytes(content)
    return _answer(["--config", str(path)], [])


def _answer(arguments: list[str], given: list[str]) -> str | None:
    try:
        settings = load_settings(arguments)
        settings.data_parallel_size(2)
        build.check(settings)
        sizes.require_room(settings)
    except (ValueError, OSError) as error:
        return str(error)
    assert from_mapping(Settings, to_mapping(settings), may_import=True) == settings, given
    return None


def _typed(hint: Any, source: random.Random) -> Any:
    """A value of the type that a setting has, of any size; None where it has another one."""
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is typing.Literal:
        return source.choice(kinds)
    if bool in kinds:
        return source.random() < 0.5
    if int in kinds:
        return source.choice([n for n in [*hostile.NUMBERS, 4, 6, 8, 12] if isinstance(n, int)])
    if float in kinds:
        return source.choice(hostile.NUMBERS)
    return source.choice(hostile.STRINGS) if str in kinds else None


def _written(value: Any, source: random.Random) -> str:
    """A value as somebody types it."""
    if isinstance(value, str) and source.random() < 0.5:
        return value
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 5000 + "]" * 5000
