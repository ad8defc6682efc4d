"""Reads YAML that may come from anybody, with bounded time and memory."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig, ListConfig

_LARGEST_FILE = 1 << 20
"""Bytes. Settings have a few thousand."""
_DEEPEST = 100
"""Levels of brackets. The parser's time grows with their square."""


def read_yaml(path: str | Path) -> "DictConfig | ListConfig":
    """Read a YAML file, with interpolations unresolved.

    OmegaConf (from 2.4 on) limits what aliases (`*name`) may stand for: a few lines of aliases of
    aliases could stand for billions of values.

    Raises:
        ValueError: the file is no YAML, is too large or nested too deeply, or stands for too much.
        FileNotFoundError: there is no such file.
    """
    import io

    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path)
    size = path.stat().st_size
    if size > _LARGEST_FILE:
        raise ValueError(
            f"{path} has {size:,} bytes, but at most {_LARGEST_FILE:,} are read. "
            "Name a YAML file of settings."
        )
    try:
        text = path.read_text("utf-8")
        require_shallow(text)
        return OmegaConf.load(io.StringIO(text))
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def require_shallow(text: str) -> None:
    """Raise ValueError if YAML has more than a hundred levels of brackets."""
    depth = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply. Leave brackets out.")
