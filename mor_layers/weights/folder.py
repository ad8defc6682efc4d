"""A model in a folder: `config.json`, `model.safetensors` and the files of a tokenizer.

The folder follows Hugging Face's layout, so that AutoModelForCausalLM can load it too (after
`import mor_huggingface`). The DecoderConfig is stored in config.json under `mor`. Tied weights are
stored once.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor_layers.models import DecoderConfig, MoRTransformer
from mor_layers.settings import from_mapping, to_mapping
from mor_layers.settings.field_types import shown
from mor_layers.weights.tensor_files import SAFETENSORS, LazyTensors, open_tensors, write_tensors

MODEL_TYPE = "mor"
CONFIG = "config.json"
SETTINGS = "mor"
"""Key of the DecoderConfig in config.json. `decoder` is taken: transformers treats it as its own
config."""
_PREFIX = "model."
"""Prefix of every name in the file: the attribute in which the transformers class holds the model.
"""
_CARRIED = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
_SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class StoredModel:
    """A model in files whose tensors are read on demand."""

    config: DecoderConfig
    weights: Mapping[str, Tensor]
    """Tensors under the names of a MoRTransformer's state dict, read on demand; tied tensors occur
    once."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Entries of config.json that every format keeps, such as special tokens and the maximum
    length."""
    side_files: tuple[Path, ...] = ()
    """The tokenizer's files."""


def save_model(
    model: MoRTransformer,
    folder: Path,
    tokenizer: Path | None = None,
    eos_token_id: int | None = None,
) -> None:
    """Save a model in a folder. An existing folder is replaced once the new one is complete.

    Args:
        tokenizer: a tokenizer.json to copy into the folder.
        eos_token_id: the token that ends a text. Servers and `generate` stop at it.
    """
    facts = {} if eos_token_id is None else {"eos_token_id": eos_token_id}
    side_files = () if tokenizer is None else (tokenizer,)
    state = model.state_dict()
    weights = LazyTensors(weight_names(model.config), state.__getitem__)
    with written_whole(folder) as partial:
        write_model(StoredModel(model.config, weights, facts, side_files), partial)
        if tokenizer is not None and tokenizer.name != "tokenizer.json":
            (partial / tokenizer.name).rename(partial / "tokenizer.json")


def load_model(folder: str | Path, trust_remote_code: bool = False) -> MoRTransformer:
    """Load a model from a folder.

    Args:
        folder: a folder written by `save_model` or `mor convert`.
        trust_remote_code: whether the folder may name a router whose module is then imported, which
            runs that module's code. Otherwise only registered routers are built.

    Raises:
        ValueError: a file is missing or damaged, or the files contradict one another.
        FileNotFoundError: the folder does not exist.
    """
    stored = open_model(Path(folder), trust_remote_code)
    model = MoRTransformer(stored.config)
    state = model.state_dict()
    with torch.no_grad():
        for name in stored.weights:
            state[name].copy_(stored.weights[name])
    return model


def open_model(folder: Path, trust_remote_code: bool = False) -> StoredModel:
    """Open a model in a folder without reading its tensors.

    Args:
        trust_remote_code: whether the folder may name a router whose module is then imported, which
            runs that module's code. Otherwise only registered routers are built.

    Raises:
        ValueError: a file is missing or damaged, or the files contradict one another. The shape of
            a tensor is checked when it is read.
        FileNotFoundError: the folder does not exist.
    """
    values = read_config(folder)
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{folder / CONFIG}: model_type={shown(values.get('model_type'))} must be {MODEL_TYPE!r}. "
            "Convert other models with `mor convert`."
        )
    config = from_mapping(DecoderConfig, values.get(SETTINGS), SETTINGS, trust_remote_code)
    tensors = open_tensors(folder)
    require_layers(config, len(tensors), folder)
    names = {name: f"{_PREFIX}{name}" for name in weight_names(config)}
    weights = fitting(config, names, tensors, folder)
    return StoredModel(config, weights, carried(values), side_files(folder))


def write_model(
    model: StoredModel, folder: Path, written: Callable[[str], None] | None = None
) -> None:
    """Write the files of a model into an existing folder, one tensor at a time."""
    names = {f"{_PREFIX}{name}": name for name in model.weights}
    tensors = LazyTensors(list(names), lambda name: model.weights[names[name]])
    values = {
        "model_type": MODEL_TYPE,
        "architectures": ["MoRForCausalLM"],
        "dtype": dtype_name(model),
        "tie_word_embeddings": model.config.tie_embeddings,
        **model.facts,
        SETTINGS: to_mapping(model.config),
    }
    write_folder(model, folder, values, tensors, written)


def write_folder(
    model: StoredModel,
    folder: Path,
    values: Mapping[str, Any],
    tensors: LazyTensors,
    written: Callable[[str], None] | None = None,
) -> None:
    """Write a model into an existing folder in any format that has a config.json: its tensors, its
    settings and the tokenizer's files.

    Args:
        values: the contents of config.json.
        tensors: the tensors under the names of the format. They are read one at a time.
        written: called with the name of each tensor that was written.
    """
    write_tensors(folder / SAFETENSORS, tensors, written)
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    copy_side_files(model, folder)


def dtype_name(model: StoredModel) -> str:
    """The dtype of the weights as config.json names it."""
    return str(model.weights["embedding.weight"].dtype).removeprefix("torch.")


def copy_side_files(model: StoredModel, folder: Path) -> None:
    """Copy the tokenizer's files into the folder."""
    for path in model.side_files:
        shutil.copyfile(path, folder / path.name)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` once it is complete, and is removed after an
    error.
    """
    partial, earlier = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "earlier"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
    if folder.exists():
        folder.rename(earlier)  # kept until the new folder is in place
    partial.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def weight_names(config: DecoderConfig) -> list[str]:
    """Names of a model's tensors; of tied tensors only the first."""
    return list(tensor_shapes(config))


def tensor_shapes(config: DecoderConfig) -> dict[str, torch.Size]:
    """Shapes of a model's tensors, in order; of tied tensors only the first."""
    return {name: tensor.shape for name, tensor in _meta_tensors(config).items()}


def _meta_tensors(config: DecoderConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        state = MoRTransformer(config).state_dict()
    if config.tie_embeddings:
        del state["output.weight"]
    return state


def _check_size(numbers: int, where: Path) -> None:
    """Raise ValueError if a folder's files are too small for its parameters, even at one byte each.

    Otherwise settings that ask for far more than the files hold would first allocate memory for it.
    """
    if where.is_dir():
        held = sum(path.stat().st_size for path in where.iterdir() if path.is_file())
        if held < numbers:
            raise ValueError(
                f"{where}: its settings describe {numbers:,} parameters, but its files have only "
                f"{held:,} bytes. Either the settings belong to another model, or a file is "
                "truncated."
            )


def state_of(config: DecoderConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A complete state dict from a model's weights, in which tied tensors occur only once."""
    state = dict(weights)
    if config.tie_embeddings:
        state["output.weight"] = state["embedding.weight"]
    return state


def fitting(
    config: DecoderConfig, names: Mapping[str, str], tensors: Mapping[str, Tensor], where: Path
) -> LazyTensors:
    """Rename a model's tensors to our names; shapes are checked when a tensor is read.

    Args:
        names: the other name for each of our names.
        where: the folder of the tensors, for error messages.

    Raises:
        ValueError: a tensor is missing, or there is one that the model does not use.
    """
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise ValueError(f"{where} has no tensor {shown(missing[0])} ({len(missing)} are missing).")
    known = set(names.values())
    unknown = [name for name in tensors if name not in known]
    if unknown:
        raise ValueError(f"{where}: a model with its settings has no tensor {shown(unknown[0])}.")
    wanted = _meta_tensors(config)
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    _check_size(sum(map(torch.Size.numel, shapes.values())), where)

    def read(name: str) -> Tensor:
        tensor = tensors[names[name]]
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(
                f"{where}: {names[name]!r} has dtype {tensor.dtype}, but {wanted[name].dtype} or a "
                "similar one is expected. Quantized weights cannot be read: use the original "
                "weights."
            )
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{where}: {names[name]!r} has shape {tuple(tensor.shape)}, but its settings "
                f"require {tuple(shapes[name])}."
            )
        return tensor

    return LazyTensors(list(names), read)


def require_layers(config: DecoderConfig, number: int, where: Path) -> None:
    """Raise ValueError if there are fewer tensors than layers.

    It is checked before layers are built in order to name their tensors, because that takes long if
    the settings ask for thousands of layers.
    """
    layers = sum(part.schedule.num_unique_layers for part in config.parts)
    if number < layers:
        raise ValueError(
            f"{where} has {number} tensors, fewer than the {layers} layers of its settings."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        ValueError: it is not a JSON object.
        FileNotFoundError: it does not exist.
    """
    return read_json(folder / CONFIG)


def require_supported(
    values: Mapping[str, Any], supported: Mapping[str, Any], where: str | Path
) -> None:
    """Raise ValueError if a config.json has another value of a field than the only supported one.

    Args:
        supported: the only supported value of each of these fields, if the field is given.
        where: the file, for the message.
    """
    for name, only in supported.items():
        if values.get(name, only) != only:
            raise ValueError(
                f"{where}: {name}={shown(values[name])} is not supported, only {only!r}."
            )


def model_type_of(folder: Path) -> str | None:
    """The `model_type` of a folder's config.json; None if it has none.

    Raises:
        ValueError: the config.json is not a JSON object.
    """
    kind = read_config(folder).get("model_type") if (folder / CONFIG).is_file() else None
    return kind if isinstance(kind, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of settings.

    Raises:
        ValueError: it is not a JSON object.
        FileNotFoundError: it does not exist.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for a file of settings.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of settings, got {shown(values)}.")
    return values


def carried(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that every format keeps."""
    return {name: values[name] for name in _CARRIED if values.get(name) is not None}


def side_files(folder: Path) -> tuple[Path, ...]:
    """The files of a tokenizer."""
    return tuple(folder / name for name in _SIDE_FILES if (folder / name).is_file())
