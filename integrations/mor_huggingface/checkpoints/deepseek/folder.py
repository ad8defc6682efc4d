"""Folders of DeepSeek's checkpoints, whose experts are tensors of their own.

Legend: `e` experts, `f` width of an expert, `h` hidden.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mor_huggingface.checkpoints.deepseek.names import (
    EMBEDDING,
    copies_of,
    deepseek_names,
    is_single,
)
from mor_huggingface.checkpoints.deepseek.settings import (
    Family,
    config_from_deepseek,
    deepseek_config,
)
from mor_huggingface.checkpoints.fp8 import without_fp8
from mor_layers import DecoderConfig
from mor_layers.models import MultiTokenPrediction
from mor_layers.weights import (
    CONFIG,
    LazyTensors,
    StoredModel,
    carried,
    dtype_name,
    fitting,
    open_tensors,
    read_config,
    require_layers,
    side_files,
    write_folder,
)

MOST_HEADS = 8
"""Layers of multi-token prediction that are read. Released checkpoints have one."""
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.((?:gate|up|down)_proj)\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def open_deepseek(folder: Path) -> StoredModel:
    """Open a checkpoint. Its tensors are read on access.

    Raises:
        ValueError: a setting is not supported, or a file is missing or damaged.
        FileNotFoundError: the folder does not exist.
    """
    values = read_config(folder)
    config = config_from_deepseek(values, str(folder / CONFIG))
    tensors = without_fp8(open_tensors(folder), values, str(folder / CONFIG))
    require_layers(config, len(tensors), folder)
    config = _with_heads(config, tensors, folder)
    joined = _Joined(_without_copies(config, tensors, folder))
    weights = fitting(config, deepseek_names(config), joined.tensors(), folder)
    return StoredModel(config, weights, carried(values), side_files(folder))


def write_deepseek(
    family: Family, model: StoredModel, folder: Path, written: Callable[[str], None] | None = None
) -> None:
    """Write a checkpoint into an existing folder, tensor by tensor.

    Raises:
        ValueError: the model is not of this family.
    """
    config = model.config
    values = deepseek_config(family, config)
    places: dict[str, tuple[str, int | None]] = {}
    for ours, theirs in deepseek_names(config).items():
        if ".experts." in theirs:
            assert config.moe is not None
            place, projection = theirs.rsplit(".", 1)
            for expert in range(config.moe.num_experts):
                places[f"{place}.{expert}.{projection}.weight"] = (ours, expert)
        else:
            places[theirs] = (ours, 0 if is_single(theirs) else None)
    output = "embedding.weight" if config.tie_embeddings else "output.weight"
    for copy, original in copies_of(config).items():
        places[copy] = ("embedding.weight" if original == EMBEDDING else output, None)

    def read(name: str) -> Tensor:
        ours, index = places[name]
        tensor = model.weights[ours]
        return tensor if index is None else tensor[index]

    values |= {"dtype": dtype_name(model), **model.facts}
    write_folder(model, folder, values, LazyTensors(list(places), read), written)


class _Joined:
    """The tensors of a checkpoint, in which those of all experts become one, `[e f h]` or `[e h f]`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self._numbers = tensors, dict[str, set[int]]()
        self._names: dict[str, None] = {}
        for name in tensors:
            match = _EXPERT.fullmatch(name)
            if match is None:
                if not name.endswith("rotary_emb.inv_freq"):
                    self._names[name] = None
                continue
            joined = f"{match[1]}.{match[3]}"
            self._names[joined] = None
            self._numbers.setdefault(joined, set()).add(int(match[2]))

    def tensors(self) -> LazyTensors:
        return LazyTensors(list(self._names), self._read)

    def _read(self, name: str) -> Tensor:
        if name not in self._numbers:
            tensor = self._tensors[name]
            return tensor[None] if is_single(name) else tensor
        place, projection = name.rsplit(".", 1)
        experts = range(len(self._numbers[name]))
        if set(experts) != self._numbers[name]:
            raise ValueError(
                f"{name!r}: experts are missing, there are {sorted(self._numbers[name])}."
            )
        return torch.stack([self._tensors[f"{place}.{e}.{projection}.weight"] for e in experts])


def _with_heads(config: DecoderConfig, tensors: Mapping[str, Tensor], where: Path) -> DecoderConfig:
    """The settings with as many heads as there are layers of multi-token prediction in the files.

    transformers leaves these layers out when it saves a model, whatever config.json says.
    """
    numbers = {int(match[1]) for match in map(_LAYER.match, tensors) if match is not None}
    heads = max(numbers, default=0) + 1 - config.num_unrolled_layers
    if heads < 1:
        return config
    if heads > MOST_HEADS:
        raise ValueError(
            f"{where}: there are tensors of {heads} layers after the {config.num_unrolled_layers} of "
            f"config.json (num_hidden_layers); at most {MOST_HEADS} can be those of multi-token "
            "prediction."
        )
    return replace(config, multi_token_prediction=MultiTokenPrediction(heads))


def _without_copies(
    config: DecoderConfig, tensors: Mapping[str, Tensor], where: Path
) -> Mapping[str, Tensor]:
    """The tensors without copies of others, which must be equal to these."""
    copies = {copy: other for copy, other in copies_of(config).items() if copy in tensors}
    for copy, other in copies.items():
        if other in tensors and not torch.equal(tensors[copy], tensors[other]):
            raise ValueError(
                f"{where}: {copy!r} differs from {other!r}, and our heads have no embedding and no "
                "output of their own."
            )
    return LazyTensors([name for name in tensors if name not in copies], tensors.__getitem__)
