"""Models and checkpoints in files that were damaged, or written by a stranger.

A format with checksums must refuse every damage. One without them cannot know of a changed number:
there, what is read must be what another reader of the format finds in the file.
"""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mor_huggingface.checkpoints.llama import open_llama, write_llama
from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    FixedDepth,
    MoRTransformer,
    RecursionConfig,
    save_model,
)
from mor_layers.weights import StoredModel
from mor_megatron.checkpoints import models as megatron
from mor_tools.formats.published_files import open_published, write_published
from mor_tools.serving.loading import load
from tests.campaigns import hostile

TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}


@cache
def _model(routed: bool) -> MoRTransformer:
    torch.manual_seed(1)
    router = ExpertChoice() if routed else FixedDepth()
    recursion = RecursionConfig(2, "cycle", router)
    return MoRTransformer(DecoderConfig(300, 8, 8, 4, 2, recursion=recursion))


def folder_of_ours(source: random.Random, folder: Path) -> str | None:
    """config.json, weights, an index of them or a tokenizer, one of them hostile."""
    model = _model(routed=True)
    save_model(model, folder / "model")
    (folder / "model" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    if source.random() < 0.3:
        _split(folder / "model")
    touched = _touch(source, folder / "model")
    try:
        read = load(str(folder / "model")).model
    except (ValueError, OSError) as error:
        return str(error)
    wanted = {
        name.removeprefix("model."): tensor
        for file in (folder / "model").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    state = read.state_dict()
    assert set(state) == set(wanted), touched
    _assert_equal(state, wanted, touched)
    return None


def megatron_checkpoint(source: random.Random, folder: Path) -> str | None:
    """A checkpoint of Megatron's format, whose pieces have checksums."""
    model = _model(routed=True)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = folder / "checkpoints"
    folder.mkdir()
    megatron.write_checkpoint(StoredModel(model.config, weights), folder)
    touched = _touch(source, folder)
    return _opened(lambda: megatron.open_checkpoint(folder), weights, touched)


def llama(source: random.Random, folder: Path) -> str | None:
    """A Llama's folder, as `mor convert` opens it."""
    model = _model(routed=False)
    write_llama(StoredModel(model.config, model.state_dict()), folder)
    if source.random() < 0.3:
        _split(folder)
    touched = _touch(source, folder)
    return _opened(lambda: open_llama(folder), None, touched)


def published(source: random.Random, folder: Path) -> str | None:
    """A published checkpoint's folder, as `mor convert` opens it."""
    model = _model(routed=True)
    write_published(StoredModel(model.config, model.state_dict()), folder)
    touched = _touch(source, folder)
    return _opened(lambda: open_published(folder), None, touched)


def _opened(
    opened: Callable[[], StoredModel], wanted: dict[str, Tensor] | None, touched: str
) -> str | None:
    try:
        stored = opened()
        state = {name: stored.weights[name] for name in stored.weights}
    except (ValueError, OSError) as error:
        return str(error)
    shapes = MoRTransformer(stored.config).state_dict()
    for name, tensor in state.items():
        assert tensor.shape == shapes[name].shape, (touched, name)
        assert tensor.is_floating_point() == shapes[name].is_floating_point(), (touched, name)
    if wanted is not None:
        _assert_equal(state, wanted, touched)
    return None


def _assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], touched: str) -> None:
    for name, tensor in found.items():
        same = torch.equal(tensor.nan_to_num(), wanted[name].to(tensor.dtype).nan_to_num())
        assert same, (touched, name)


def _split(folder: Path) -> None:
    """Name the weights' file in an index instead of by its usual name."""
    file = folder / "model.safetensors"
    names = dict.fromkeys(load_file(file), "one.safetensors")
    file.rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _touch(source: random.Random, folder: Path) -> str:
    """Change one file; what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = source.choice(files)
    is_json, chance = path.suffix == ".json", source.random()
    if chance < 0.08:
        path.unlink()
        return f"{path.name} removed"
    if chance < 0.12:
        path.unlink()
        path.mkdir()
        return f"{path.name} is a folder"
    if chance < 0.2:
        return "nothing"
    if path.suffix == ".safetensors" and chance < 0.5:
        _retyped(source, path)
        return f"{path.name} retyped"
    if is_json and chance < 0.75:
        mapping: Any = hostile.changed(source, json.loads(path.read_text()))
        if source.random() < 0.05:
            mapping = hostile.value(source)
        path.write_bytes(hostile.as_json(mapping))
        return f"{path.name} changed"
    path.write_bytes(hostile.damaged(source, path.read_bytes()))
    return f"{path.name} damaged"


def _retyped(source: random.Random, path: Path) -> None:
    """Give a tensor another kind of numbers, another shape, or another name."""
    tensors = load_file(path)
    name = source.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = source.randrange(4)
    if kind == 0:
        dtypes = [torch.int8, torch.bool, torch.float16, torch.bfloat16, torch.float64, torch.int64]
        tensors[name] = tensor.to(source.choice(dtypes))
    elif kind == 1:
        tensors[name] = tensor.flatten()[: max(1, tensor.numel() // 2)].clone()
    elif kind == 2:
        tensors[f"{name}.more"] = tensor
    save_file(tensors, path)
