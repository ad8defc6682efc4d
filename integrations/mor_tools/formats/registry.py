"""The formats of models, and the one place that tells from its files what a path holds.

transformers and Megatron-Core are imported only for the formats that need them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor_layers import DecoderConfig, load_config
from mor_layers.weights import (
    CONFIG,
    MODEL_TYPE,
    StoredModel,
    open_model,
    read_config,
    read_json,
    require_unrollable,
    write_model,
)
from mor_tools.formats.published_files import is_published, open_published, write_published
from mor_tools.formats.published_settings import published_settings

RUN_CLAIM = "run.json"
"""Of a pretraining run's folder: its settings, `settings`, and the text it learns, `text`."""
RUN_CHECKPOINTS = "checkpoints"
"""Of a pretraining run's folder: its Megatron checkpoints."""
RUN_MODEL = "model"
"""Of a pretraining run's folder: the folder of the model that it made, once it is finished."""

Written = Callable[[str], None]


@dataclass(frozen=True)
class Format:
    """How models of a format are opened and written."""

    name: str
    """As `--to` has it."""
    matches: Callable[[Path], bool]
    """Whether a path holds such a model, by its files."""
    open: Callable[[Path, DecoderConfig | None, bool], StoredModel]
    """Without reading tensors. Settings are for a format that may lack them; the last says whether
    the model may name a router whose module is imported."""
    write: Callable[[StoredModel, Path, Written | None], None]
    """Into an existing folder, tensor by tensor."""
    takes_settings: bool = False
    """Whether a model may lack its DecoderConfig."""
    require_place: Callable[[DecoderConfig], object] = lambda config: None
    """Raises ValueError where the format cannot say what such a model does."""


def detected(source: Path) -> Format:
    """The format of `source`.

    Raises:
        ValueError: none fits.
        FileNotFoundError: there is nothing.
    """
    for kind in FORMATS.values():
        if kind.matches(source):
            return kind
    if not source.exists():
        raise FileNotFoundError(f"there is no {source}")
    raise ValueError(
        f"{source} is no model: it has no {CONFIG}, no Megatron checkpoint (latest, or .metadata) "
        "and is no pair NAME.json and NAME.safetensors. Name the folder of a model, of checkpoints, "
        "or of a pretraining run."
    )


def opened(source: Path) -> StoredModel:
    """A model in any format, without reading tensors; it may name registered routers only.

    Raises:
        ValueError: there is no model, or it is damaged.
        FileNotFoundError: there is nothing, or a part is missing.
    """
    return detected(source).open(source, None, False)


def model_folder(source: Path) -> Path:
    """The folder of a model of ours: the source, or what a finished pretraining run has in it.

    Raises:
        ValueError: it is no model, or one in another format.
        FileNotFoundError: there is nothing.
    """
    for folder in (source, source / RUN_MODEL):
        if _is_ours(folder):
            return folder
    raise ValueError(
        f"{source} is a model in format {detected(source).name!r}, not {MODEL_TYPE!r}. Make one with "
        "`mor convert`, and name that; a finished pretraining run has one in its `model`."
    )


def trained_length(folder: Path) -> int | None:
    """Tokens of the sequences that a model of ours was trained on, where its files say it."""
    longest = read_config(folder).get("max_position_embeddings")
    if isinstance(longest, int):
        return longest
    claim = folder.parent / RUN_CLAIM
    if claim.is_file():
        return int(read_json(claim)["settings"]["data"]["sequence_length"])
    return None


def read_settings(path: Path | None) -> DecoderConfig | None:
    """A DecoderConfig from a YAML file; None without one."""
    return None if path is None else load_config(DecoderConfig, path)


def _is_ours(source: Path) -> bool:
    return (source / CONFIG).is_file() and read_config(source).get("model_type") == MODEL_TYPE


def _is_megatron(source: Path) -> bool:
    places = (source, source / RUN_CHECKPOINTS)
    return (source / ".metadata").is_file() or any((p / "latest").is_file() for p in places)


def _megatron() -> Any:
    try:
        from mor_megatron.checkpoints import models
    except ImportError as error:
        raise ValueError(
            f'Megatron checkpoints need pip install "mor-layers[megatron]": {error}.'
        ) from error
    return models


def _llama() -> Any:
    from mor_huggingface import llama

    return llama


def _require_llama(config: DecoderConfig) -> None:
    _llama().llama_config(config)
    require_unrollable(config)


FORMATS = {
    kind.name: kind
    for kind in (
        Format(
            "megatron",
            _is_megatron,
            lambda source, settings, trust: _megatron().open_checkpoint(source, settings, trust),
            lambda model, folder, written: _megatron().write_checkpoint(model, folder, written),
            takes_settings=True,
        ),
        Format(
            MODEL_TYPE, _is_ours, lambda source, _, trust: open_model(source, trust), write_model
        ),
        Format(
            "published",
            is_published,
            lambda source, *_: open_published(source),
            write_published,
            require_place=published_settings,
        ),
        Format(
            "llama",
            lambda source: (source / CONFIG).is_file(),
            lambda source, *_: _llama().open_llama(source),
            lambda model, folder, written: _llama().write_llama(model, folder, written),
            require_place=_require_llama,
        ),
    )
}
"""By name; the first that matches is a model's."""
