"""Reads and writes published Mixture-of-Recursions checkpoints.

There are two forms. One is a folder as Hugging Face uses it, with config.json and weights in
safetensors or `.bin` files. Its sections `recursive`, `kv_sharing` and `mor` are in config.json, or in
a YAML file of the folder, which is the configuration of the released code. The other is a pair of
files NAME.json and NAME.safetensors with tensors `param.*`, as in the reference cases.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor_layers import DecoderConfig
from mor_layers.settings import read_yaml
from mor_layers.settings.field_types import shown
from mor_layers.weights import (
    CONFIG,
    LazyTensors,
    StoredModel,
    carried,
    dtype_name,
    fitting,
    open_tensor_file,
    open_tensors,
    read_config,
    read_json,
    require_layers,
    require_supported,
    side_files,
    weight_names,
    write_folder,
)
from mor_tools.formats.published import config_from_published, published_aliases, published_names
from mor_tools.formats.published_settings import published_settings

_SETTINGS = ("recursive", "kv_sharing", "mor")
_PARAMETER = "param."
_WITHOUT_PLACE = {"attention_bias": False, "mlp_bias": False, "rope_scaling": None}


def is_published(source: Path) -> bool:
    """Whether `source` is a published checkpoint in one of the two forms."""
    if not source.is_dir():
        return _pair(source)[1].is_file()
    if not (source / CONFIG).is_file():
        return False
    return _SETTINGS[0] in read_config(source) or _yaml_settings(source) is not None


def open_published(source: Path) -> StoredModel:
    """Open a published checkpoint. Its tensors are read on access.

    Tied tensors, which are listed under several names, must be equal. Buffers that the checkpoint
    does not contain get the values of a trained model, so the warm-up of capacities is over.

    Raises:
        ValueError: a setting or a tensor is missing, damaged or has the wrong shape, or tied tensors
            differ. Raised here or when a tensor is read.
        FileNotFoundError: there are no settings.
    """
    if source.is_dir():
        where, values = source / CONFIG, read_config(source)
        settings = {"architecture": _architecture(values, where)}
        settings |= (values if _SETTINGS[0] in values else _yaml_settings(source)) or {}
        tensors, files = open_tensors(source), side_files(source)
    else:
        where, tensor_file = _pair(source)
        settings, files = read_json(where), ()
        values = settings.get("architecture", {})
        found = open_tensor_file(tensor_file)
        own = [n.removeprefix(_PARAMETER) for n in found if n.startswith(_PARAMETER)]
        tensors = LazyTensors(own, lambda name: found[f"{_PARAMETER}{name}"])
    try:
        config = config_from_published(settings)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: the settings architecture, {', '.join(_SETTINGS)} are incomplete: "
            f"{shown(str(error))[1:-1]}."
        ) from error
    require_layers(config, len(tensors), source)
    weights = _weights(config, tensors, source)
    return StoredModel(config, weights, carried(values), files)


def write_published(
    model: StoredModel, folder: Path, written: Callable[[str], None] | None = None
) -> None:
    """Write a published checkpoint into an existing folder, tensor by tensor.

    Tied tensors are written once.

    Raises:
        ValueError: the published code does not support a setting.
    """
    settings = published_settings(model.config)
    names = {theirs: ours for ours, theirs in published_names(model.config).items()}
    tensors = LazyTensors(list(names), lambda name: model.weights[names[name]])
    values = {
        "model_type": "llama",
        "hidden_act": "silu",
        "dtype": dtype_name(model),
        **settings.pop("architecture"),
        **model.facts,
        **settings,
    }
    write_folder(model, folder, values, tensors, written)


def _weights(config: DecoderConfig, tensors: Mapping[str, Tensor], where: Path) -> LazyTensors:
    names = published_names(config)
    listed: dict[str, list[str]] = {theirs: [] for theirs in names.values()}
    rest = []
    aliases = published_aliases(config)
    for name in tensors:
        if name in listed:
            listed[name].insert(0, name)
        elif name in aliases:
            listed[aliases[name]].append(name)
        elif not name.endswith("rotary_emb.inv_freq"):
            rest.append(name)

    def read(name: str) -> Tensor:
        first, *others = listed.get(name) or [name]
        tensor = tensors[first]
        for other in others:
            if not torch.equal(tensors[other], tensor):
                raise ValueError(f"{where}: {first!r} and {other!r} are tied, but differ.")
        return tensor

    found = LazyTensors([*(n for n, own in listed.items() if own), *rest], read)
    stored, buffers = fitting(config, names, found, where), _buffers(config)
    return LazyTensors(
        weight_names(config), lambda n: stored[n] if n in stored else buffers[n].clone()
    )


def _buffers(config: DecoderConfig) -> dict[str, Tensor]:
    """The state of the routers that published checkpoints do not contain."""
    recursion, schedule = config.effective_recursion, config.schedule
    router = recursion.router.build(config.hidden_size, recursion.num_recursions)
    blocks = 1 if schedule.is_cyclic else schedule.block_size
    state = router.state_dict()
    for name, value in recursion.router.published_for(recursion.num_recursions).buffers.items():
        state[name].fill_(value)
    return {f"recursions.{b}.router.{name}": t for b in range(blocks) for name, t in state.items()}


def _pair(source: Path) -> tuple[Path, Path]:
    name = source.with_suffix("") if source.suffix in (".json", ".safetensors") else source
    return name.with_name(f"{name.name}.json"), name.with_name(f"{name.name}.safetensors")


def _architecture(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    require_supported(values, _WITHOUT_PLACE, where)
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{where}: rope_parameters={shown(rope)}: expected a mapping.")
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"{where}: rope_type={shown(rope['rope_type'])} is not supported, only 'default'."
        )
    return dict(values) | {
        "rope_theta": rope.get("rope_theta", values.get("rope_theta", 10000.0)),
        "num_key_value_heads": values.get("num_key_value_heads", values.get("num_attention_heads")),
    }


def _yaml_settings(folder: Path) -> dict[str, Any] | None:
    """The configuration of the released code in a YAML file of the folder, or None."""
    from omegaconf import OmegaConf

    for path in sorted(folder.glob("*.yaml")):
        values = OmegaConf.to_container(read_yaml(path))
        if isinstance(values, dict) and _SETTINGS[0] in values:
            return {str(name): values[name] for name in _SETTINGS if name in values}
    return None
