"""Models in Megatron checkpoints of any parallel layout, read and written without starting ranks.

The folder has the structure of `runs`: a file `latest` and folders `step_<n>`. The checkpoint also
contains the model's settings as `extra["decoder"]`, see `describe`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mor_layers import DecoderConfig, from_mapping, to_mapping
from mor_layers.weights import LazyTensors, StoredModel, copy_side_files, side_files
from mor_megatron.checkpoints.dist_files import (
    DistTensors,
    is_dist_checkpoint,
    write_dist_checkpoint,
)
from mor_megatron.checkpoints.weights import decoder_view, megatron_names, megatron_view

_LATEST, _DECODER, _FACTS = "latest", "decoder", "facts"
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_OPTIMIZER = "optimizer."


def describe(config: DecoderConfig, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `extra` to pass to `checkpoints.runs.save`, so that the checkpoint describes its model.

    Args:
        config: settings of the model, with the size of the vocabulary without padding.
        facts: further entries of a config.json, see `StoredModel.facts`.
    """
    return {_DECODER: to_mapping(config), _FACTS: dict(facts or {})}


def open_checkpoint(
    folder: Path, config: DecoderConfig | None = None, trust_remote_code: bool = False
) -> StoredModel:
    """The model of a checkpoint. Its tensors are read on access. Optimizer state is ignored.

    Rows that pad the vocabulary are removed.

    Args:
        folder: the folder of a run, a folder of checkpoints, or a checkpoint. In the first two cases,
            the latest checkpoint is used.
        config: the model's settings. Only needed if the checkpoint does not contain them.
        trust_remote_code: whether a module that the checkpoint names for its router may be imported,
            which runs that module's code. Otherwise only registered routers are built.

    Raises:
        ValueError: settings or a tensor are missing, damaged or have the wrong shape. Raised here or
            when a tensor is read.
        FileNotFoundError: there is no complete checkpoint.
    """
    source = checkpoint_folder(folder)
    tensors = DistTensors(source)
    extra = tensors.common.get("extra") or {}
    if config is None:
        if _DECODER not in extra:
            raise ValueError(
                f"{source} does not contain the settings of its model. Pass the DecoderConfig (`mor "
                "convert --settings FILE.yaml`), or save with extra=describe(config)."
            )
        where = f"{source}: decoder"
        config = from_mapping(DecoderConfig, extra[_DECODER], where, trust_remote_code)
    names = [name for name in tensors if not name.startswith(_OPTIMIZER)]
    wanted = megatron_names(config, names)
    missing = [name for name in wanted if name not in tensors]
    unknown = [name for name in names if name not in wanted]
    if missing or unknown:
        what = f"has no tensor {missing[0]!r}" if missing else f"has a tensor {unknown[0]!r} too"
        raise ValueError(f"{source} {what}. Check that the settings are those of this model.")
    rows = config.vocab_size

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        if name not in _VOCABULARY:
            return tensor
        if len(tensor) < rows:
            raise ValueError(
                f"{source}: {name!r} has {len(tensor)} rows, fewer than vocab_size={rows}."
            )
        return tensor[:rows]

    weights = decoder_view(LazyTensors(wanted, read), config, str(source))
    beside = source if folder == source else source.parent
    return StoredModel(config, weights, extra.get(_FACTS) or {}, side_files(beside))


def write_checkpoint(
    model: StoredModel, folder: Path, written: Callable[[str], None] | None = None
) -> None:
    """Write a checkpoint of step 0, tensor by tensor, into an existing folder of checkpoints.

    The vocabulary is not padded, because Megatron fills its padding with zeros on loading.

    Raises:
        ValueError: Megatron does not support a setting.
    """
    config = model.config
    tensors = megatron_view(model.weights, config)
    step = folder / "step_00000000"
    step.mkdir()
    objects = []
    for name in tensors:  # Megatron's linear layers have an extra state in addition to weights
        stem = name.removesuffix(".weight")
        if not stem.rpartition(".")[2].startswith("linear_"):
            continue
        is_expert = ".experts.experts." in name
        number = config.moe.num_experts if is_expert and config.moe is not None else 1
        objects += [f"{stem}._extra_state/shard_{i}_{number}" for i in range(number)]
    common = {"step": 0, "extra": describe(config, model.facts), "scheduler": None}
    write_dist_checkpoint(step, tensors, objects, common, written)
    copy_side_files(model, folder)
    (folder / _LATEST).write_text(step.name, "utf-8")


def checkpoint_folder(folder: Path) -> Path:
    """The newest complete checkpoint in the folder of a run or of checkpoints.

    A folder that is a checkpoint itself is returned unchanged.

    Raises:
        FileNotFoundError: there is none.
    """
    if is_dist_checkpoint(folder):
        return folder
    for directory in (folder, folder / "checkpoints"):
        if (directory / _LATEST).is_file():
            found = directory / (directory / _LATEST).read_text("utf-8", "replace").strip()
            if is_dist_checkpoint(found):
                return found
            raise FileNotFoundError(
                f"{directory / _LATEST} names {found.name}, which is not a complete checkpoint."
            )
    raise FileNotFoundError(f"there is no complete checkpoint in {folder}")
