"""The formats of models, and the detection of a path's format from its files.

Other code asks this module and does not look at the files of a model itself. transformers and
Megatron-Core are imported only for the formats that need them.
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
    model_type_of,
    open_model,
    read_config,
    read_json,
    require_unrollable,
    write_model,
)
from mor_tools.formats.published_files import is_published, open_published, write_published
from mor_tools.formats.published_settings import published_settings

RUN_CLAIM = "run.json"
"""File in the folder of a pretraining run with its settings, `settings`, and its text, `text`."""
RUN_CHECKPOINTS = "checkpoints"
"""Folder of Megatron checkpoints in the folder of a pretraining run."""
RUN_MODEL = "model"
"""Folder of the trained model in the folder of a finished pretraining run."""

Written = Callable[[str], None]


@dataclass(frozen=True)
class Format:
    """A format, with functions that open and write models."""

    name: str
    """Name of the format for the option `--to`."""
    matches: Callable[[Path], bool]
    """Whether a path is a model in this format, judged by its files."""
    open: Callable[[Path, DecoderConfig | None, bool], StoredModel]
    """Opens a model without reading its tensors. The arguments are the path, the settings if the
    format may lack them, and whether a module that the model names for its router may be imported."""
    write: Callable[[StoredModel, Path, Written | None], None]
    """Writes a model into an existing folder, tensor by tensor."""
    takes_settings: bool = False
    """Whether a model in this format may lack its DecoderConfig."""
    require_place: Callable[[DecoderConfig], object] = lambda config: None
    """Raises ValueError if the format cannot represent a model with these settings."""
    has_public_model: bool = False
    """Whether the installed transformers library computes models in this format."""


def detected(source: Path) -> Format:
    """The format of `source`.

    Raises:
        ValueError: the path is not a model in any format.
        FileNotFoundError: the path does not exist.
    """
    for kind in FORMATS.values():
        if kind.matches(source):
            return kind
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist.")
    raise ValueError(
        f"{source} is not a model: it has no {CONFIG} and no Megatron checkpoint (latest, or "
        ".metadata), and is not a pair NAME.json and NAME.safetensors. Pass the folder of a model, "
        "of checkpoints, or of a pretraining run."
    )


def opened(source: Path) -> StoredModel:
    """Open a model in any format, without reading its tensors. Its router must be registered.

    Raises:
        ValueError: the path is not a model, or the model is damaged.
        FileNotFoundError: the path does not exist, or a file is missing.
    """
    return detected(source).open(source, None, False)


def model_folder(source: Path) -> Path:
    """The folder of a model in our format, given that folder or that of a finished pretraining run.

    Raises:
        ValueError: the path is not a model, or has another format.
        FileNotFoundError: the path does not exist.
    """
    for folder in (source, source / RUN_MODEL):
        if _is_ours(folder):
            return folder
    raise ValueError(
        f"{source} is a model in format {detected(source).name!r}, not {MODEL_TYPE!r}. Convert it "
        "with `mor convert`. A finished pretraining run has a model in its folder `model`."
    )


def trained_length(folder: Path) -> int | None:
    """The sequence length that a model in our format was trained with, or None if it is unknown."""
    longest = read_config(folder).get("max_position_embeddings")
    if isinstance(longest, int):
        return longest
    claim = folder.parent / RUN_CLAIM
    if claim.is_file():
        return int(read_json(claim)["settings"]["data"]["sequence_length"])
    return None


def read_settings(path: Path | None) -> DecoderConfig | None:
    """Read a DecoderConfig from a YAML file. None if there is no path."""
    return None if path is None else load_config(DecoderConfig, path)


def _is_ours(source: Path) -> bool:
    return model_type_of(source) == MODEL_TYPE


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
    from mor_huggingface.checkpoints import llama

    return llama


def _looped() -> Any:
    from mor_huggingface.checkpoints import looped

    return looped


def _format_of_looped(name: str) -> Format:
    """The format of a family of published looped models."""

    def family() -> Any:
        return _looped().FAMILIES[name]

    return Format(
        name,
        lambda source: model_type_of(source) == name,
        lambda source, *_: _looped().open_looped(source),
        lambda model, folder, written: _looped().write_looped(family(), model, folder, written),
        require_place=lambda config: _looped().looped_config(family(), config),
    )


def _deepseek() -> Any:
    from mor_huggingface.checkpoints import deepseek

    return deepseek


def _format_of_deepseek(name: str) -> Format:
    """The format of DeepSeek-V2 or DeepSeek-V3."""

    def family() -> Any:
        return _deepseek().FAMILIES[name]

    return Format(
        name,
        lambda source: model_type_of(source) == name,
        lambda source, *_: _deepseek().open_deepseek(source),
        lambda model, folder, written: _deepseek().write_deepseek(family(), model, folder, written),
        require_place=lambda config: _deepseek().deepseek_config(family(), config),
        has_public_model=True,
    )


def _huginn() -> Any:
    from mor_huggingface.checkpoints import huginn

    return huginn


def _is_llama(source: Path) -> bool:
    _looped().refuse_other_loops(source)
    return (source / CONFIG).is_file()


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
        *map(_format_of_looped, ("ouro", "nanbeige")),
        Format(
            "huginn",
            lambda source: model_type_of(source) == _huginn().MODEL_TYPE,
            lambda source, *_: _huginn().open_huginn(source),
            lambda model, folder, written: _huginn().write_huginn(model, folder, written),
            require_place=lambda config: _huginn().huginn_config(config),
        ),
        *map(_format_of_deepseek, ("deepseek_v2", "deepseek_v3")),
        Format(
            "llama",
            _is_llama,
            lambda source, *_: _llama().open_llama(source),
            lambda model, folder, written: _llama().write_llama(model, folder, written),
            require_place=_require_llama,
            has_public_model=True,
        ),
    )
}
"""All formats by name. The first one that matches is the format of a model."""
