"""Chat templates: how a model wants the messages of a conversation written as one text.

A template is a file of the model's folder, in Jinja as Hugging Face uses it. It runs in Jinja's sandbox,
where it reaches neither files nor Python's internals; the messages are data and never code.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mor_layers.weights import read_json

_FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"


class TemplateError(ValueError):
    """The template cannot write these messages."""


class ChatTemplate:
    """A template.

    Args:
        source: in Jinja.
        variables: further names that the template may use, such as `eos_token`.

    Raises:
        ValueError: the source is no template.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _as_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is no template: {error}") from error
        self.variables = dict(variables)

    def render(self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> str:
        """The text of a conversation, up to where the assistant's answer begins.

        Args:
            variables: further names that the template may use, which the caller sets.

        Raises:
            TemplateError: the template refuses these messages, or cannot write them.
        """
        names = self.variables | dict(variables)
        names |= {"messages": messages, "add_generation_prompt": True}
        try:
            return self._template.render(names)
        except Exception as error:  # whatever the template's expressions raise
            raise TemplateError(
                f"the chat template cannot write these messages: {error}"
            ) from error


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a model's folder, or None if it has none.

    Raises:
        ValueError: a file is damaged.
    """
    config = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    tokens = {name: text for name in config if (text := special_token(config, name)) is not None}
    file = folder / _FILE
    try:
        source = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
        if isinstance(source, list):  # several, with names
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return None if source is None else ChatTemplate(source, tokens)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the chat template of {folder} cannot be used: {error}") from error


def special_token(config: Mapping[str, Any], name: str) -> str | None:
    """The text of a special token, such as `eos_token`, in a tokenizer_config.json."""
    value = config.get(name) if name.endswith("_token") else None
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _as_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
