"""A model in a folder: `config.json`, `model.safetensors` and a tokenizer's files.

The folder follows Hugging Face's layout: after `import mor_huggingface`, AutoModelForCausalLM can load
it too. The DecoderConfig is in config.json under `mor`. Tied weights are stored once.
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
"""The key of the DecoderConfig. It is not `decoder`, which transformers treats as its own config."""
_PREFIX = "model."
"""Prefix of each name in the file: the attribute under which transformers' class holds the model."""
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
    """A model in files, whose tensors are read on demand."""

    config: DecoderConfig
    weights: Mapping[str, Tensor]
    """Tensors by the names of a MoRTransformer's state dict, read on demand. Tied ones occur once."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Other entries of config.json that every format keeps: special tokens, longest text."""
    side_files: tuple[Path, ...] = ()
    """The tokenizer's files."""


def save_model(
    model: MoRTransformer,
    folder: Path,
    tokenizer: Path | None = None,
    eos_token_id: int | None = None,
) -> None:
    """Write a folder. An existing folder is replaced once the new one is complete.

    Args:
        tokenizer: a tokenizer.json to copy.
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
    """Load the model of a folder.

    Args:
        folder: a folder that `save_model` or `mor convert` wrote.
        trust_remote_code: whether the folder may name a router whose module is imported, which runs
            that module's code. Without it only registered routers are built.

    Raises:
        ValueError: a file is missing or damaged, or its parts do not fit.
        FileNotFoundError: there is no such folder.
    """
    stored = open_model(Path(folder), trust_remote_code)
    model = MoRTransformer(stored.config)
    state = model.state_dict()
    with torch.no_grad():
        for name in stored.weights:
            state[name].copy_(stored.weights[name])
    return model


def open_model(folder: Path, trust_remote_code: bool = False) -> StoredModel:
    """Open the model of a folder without reading its tensors.

    Args:
        trust_remote_code: whether the folder may name a router whose module is imported, which runs
            that module's code. Without it only registered routers are built.

    Raises:
        ValueError: a file is missing or damaged, or its parts do not fit. Shapes are checked when a
            tensor is read.
        FileNotFoundError: there is no such folder.
    """
    values = read_config(folder)
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{folder / CONFIG}: model_type={shown(values.get('model_type'))} must be {MODEL_TYPE!r}. "
            "`mor convert` makes such a folder from other models."
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
    """Write a model's files into an existing folder, tensor by tensor."""
    names = {f"{_PREFIX}{name}": name for name in model.weights}
    tensors = LazyTensors(list(names), lambda name: model.weights[names[name]])
    write_tensors(folder / SAFETENSORS, tensors, written)
    values = {
        "model_type": MODEL_TYPE,
        "architectures": ["MoRForCausalLM"],
        "dtype": dtype_name(model),
        "tie_word_embeddings": model.config.tie_embeddings,
        **model.facts,
        SETTINGS: to_mapping(model.config),
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    copy_side_files(model, folder)


def dtype_name(model: StoredModel) -> str:
    """The dtype of the weights, as config.json names it."""
    return str(model.weights["embedding.weight"].dtype).removeprefix("torch.")


def copy_side_files(model: StoredModel, folder: Path) -> None:
    """Copy the tokenizer's files into the folder."""
    for path in model.side_files:
        shutil.copyfile(path, folder / path.name)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """An empty folder that is renamed to `folder` once it is complete, and removed after an error."""
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
        folder.rename(earlier)  # kept until the new one has its name
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
    """Raise ValueError where a folder's files are too small for so many numbers of one byte.

    Settings that ask for more than the files hold would otherwise take memory for it first.
    """
    if where.is_dir():
        held = sum(path.stat().st_size for path in where.iterdir() if path.is_file())
        if held < numbers:
            raise ValueError(
                f"{where}: its settings ask for {numbers:,} numbers, and its files have {held:,} "
                "bytes. Either belongs to another model, or the files are cut short."
            )


def state_of(config: DecoderConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole state dict from a model's weights, in which tied ones stand once."""
    state = dict(weights)
    if config.tie_embeddings:
        state["output.weight"] = state["embedding.weight"]
    return state


def fitting(
    config: DecoderConfig, names: Mapping[str, str], tensors: Mapping[str, Tensor], where: Path
) -> LazyTensors:
    """Rename a model's tensors from other names to ours, and check their shapes when they are read.

    Args:
        names: the other name for each of our names.
        where: the folder of the tensors, for error messages.

    Raises:
        ValueError: a tensor is missing, or there is one that the model does not use.
    """
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise ValueError(
            f"{where} has no tensor {shown(missing[0])}, nor {len(missing) - 1} others."
        )
    known = set(names.values())
    unknown = [name for name in tensors if name not in known]
    if unknown:
        raise ValueError(
            f"{where}: its settings leave no place for the tensor {shown(unknown[0])}."
        )
    wanted = _meta_tensors(config)
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    _check_size(sum(map(torch.Size.numel, shapes.values())), where)

    def read(name: str) -> Tensor:
        tensor = tensors[names[name]]
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(
                f"{where}: {names[name]!r} holds {tensor.dtype} numbers; {wanted[name].dtype} or "
                "another kind of the same sort is expected. Quantized weights cannot be read: use "
                "those they were made from."
            )
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{where}: {names[name]!r} has shape {tuple(tensor.shape)}; its settings ask for "
                f"{tuple(shapes[name])}."
            )
        return tensor

    return LazyTensors(list(names), read)


def require_layers(config: DecoderConfig, number: int, where: Path) -> None:
    """Raise ValueError where there are fewer tensors than layers, before layers are made to name
    them: that takes long where settings name thousands."""
    schedule = config.schedule
    layers = schedule.prelude + schedule.block_size + schedule.coda
    if number < layers:
        raise ValueError(
            f"{where} has {number} tensors, fewer than the {layers} layers of its settings."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        ValueError: it is no JSON mapping.
        FileNotFoundError: it is not there.
    """
    return read_json(folder / CONFIG)


def read_json(path: Path) -> dict[str, Any]:
    """A mapping of settings in a file.

    Raises:
        ValueError: it is no JSON mapping.
        FileNotFoundError: it is not there.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be settings.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of settings, got {shown(values)}.")
    return values


def carried(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that every format keeps."""
    return {name: values[name] for name in _CARRIED if values.get(name) is not None}


def side_files(folder: Path) -> tuple[Path, ...]:
    """A tokenizer's files."""
    return tuple(folder / name for name in _SIDE_FILES if (folder / name).is_file())
