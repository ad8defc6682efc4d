"""Reads Ouro checkpoints as recursive models, and writes such models as Ouro checkpoints.

Ouro (Zhu et al. 2025, arXiv 2510.25741; config and tensors as in ByteDance/Ouro-1.4B) runs its whole
stack `total_ut_steps` times, with a norm on both sides of attention and MLP. Its last norm runs after every
loop: that of the later loops' input is our `loop_norm`, and the exit gate reads the same. So one tensor of
theirs is three of ours, which must be equal for a model to be written as an Ouro.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor_huggingface.llama import config_from_llama, llama_config
from mor_layers import DecoderConfig, RecursionConfig
from mor_layers.routers import ExitGate
from mor_layers.settings.field_types import shown
from mor_layers.weights import (
    CONFIG,
    SAFETENSORS,
    LazyTensors,
    StoredModel,
    carried,
    copy_side_files,
    dtype_name,
    fitting,
    layer_names,
    open_tensors,
    read_config,
    require_layers,
    side_files,
    write_tensors,
)

MODEL_TYPE = "ouro"
_NORM = "model.norm.weight"
_GATE = "model.early_exit_gate"
_COPIES = ("recursions.0.step_input.norms.0", "recursions.0.router.norm")
"""Our tensors that are equal to the last norm in an Ouro."""
_SANDWICH = {"attention_output_norm": "input_layernorm_2", "mlp_output_norm": "post_attention_layernorm_2"}
_LOOPS = range(2, 65)
"""Numbers of loops that are read."""


def is_ouro(folder: Path) -> bool:
    """Whether a folder has an Ouro's config.json."""
    return (folder / CONFIG).is_file() and read_config(folder).get("model_type") == MODEL_TYPE


def open_ouro(folder: Path) -> StoredModel:
    """Open an Ouro checkpoint. Its tensors are read on access.

    Raises:
        ValueError: a setting is not supported, or a file is missing or damaged.
        FileNotFoundError: the folder does not exist.
    """
    values = read_config(folder)
    config = config_from_ouro(values, str(folder / CONFIG))
    tensors = open_tensors(folder)
    require_layers(config, len(tensors), folder)
    names = ouro_names(config)
    kept = [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        return tensor[0] if name == f"{_GATE}.weight" and tensor.shape[:1] == (1,) else tensor

    return StoredModel(
        config,
        fitting(config, names, LazyTensors(kept, read), folder),
        carried(values),
        side_files(folder),
    )


def write_ouro(
    model: StoredModel, folder: Path, written: Callable[[str], None] | None = None
) -> None:
    """Write an Ouro checkpoint into an existing folder, tensor by tensor.

    Raises:
        ValueError: the model is no Ouro.
    """
    values = ouro_config(model.config)
    last = model.weights["norm.weights.0"]
    for name in _COPIES:
        if not torch.equal(model.weights[name].to(last.dtype), last):
            raise ValueError(
                f"{name} differs from norm.weights.0, and an Ouro has one norm for both. Keep the model "
                "in our format."
            )
    names = {theirs: ours for ours, theirs in ouro_names(model.config).items() if ours not in _COPIES}

    def read(name: str) -> Tensor:
        tensor = model.weights[names[name]]
        if name.startswith(_GATE):
            tensor = tensor.to(last.dtype)
        return tensor[None] if name == f"{_GATE}.weight" else tensor

    write_tensors(folder / SAFETENSORS, LazyTensors(list(names), read), written)
    values |= {"dtype": dtype_name(model), **model.facts}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    copy_side_files(model, folder)


def config_from_ouro(values: Mapping[str, Any], where: str = CONFIG) -> DecoderConfig:
    """Convert the settings in an Ouro's config.json to a DecoderConfig.

    Raises:
        ValueError: a setting is missing or not supported.
    """
    layers = set(values.get("layer_types") or ["full_attention"])
    if layers != {"full_attention"}:
        raise ValueError(
            f"{where}: layer_types={sorted(layers)} is not supported, only 'full_attention'."
        )
    loops, threshold = values.get("total_ut_steps", 4), values.get("early_exit_threshold")
    if not isinstance(loops, int) or loops not in _LOOPS:
        raise ValueError(
            f"{where}: total_ut_steps={shown(loops)} must be an integer from {_LOOPS[0]} to "
            f"{_LOOPS[-1]}."
        )
    if values.get("early_exit_step") is not None:
        raise ValueError(
            f"{where}: early_exit_step={shown(values['early_exit_step'])} is not supported, only null: "
            "lower total_ut_steps instead."
        )
    threshold = 1.0 if threshold is None else threshold
    if not isinstance(threshold, int | float):
        raise ValueError(f"{where}: early_exit_threshold={shown(threshold)} must be a number.")
    # Apart from its loops, an Ouro has the settings of a Llama without grouped queries by default.
    plain = config_from_llama({**values, "model_type": "llama"}, where)
    recursion = RecursionConfig(
        num_recursions=loops,
        sharing="cycle",
        router=ExitGate(float(threshold), plain.rms_norm_epsilon),
        loop_norm=True,
        sandwich_norms=True,
    )
    layers_run = plain.num_unrolled_layers * loops
    return replace(plain, recursion=recursion, num_unrolled_layers=layers_run)


def ouro_config(config: DecoderConfig) -> dict[str, Any]:
    """Convert a DecoderConfig to the settings of an Ouro.

    Raises:
        ValueError: the model is no Ouro; the message names the settings that differ.
    """
    recursion = config.effective_recursion
    router = recursion.router
    threshold = router.threshold if isinstance(router, ExitGate) else 1.0
    same = RecursionConfig(
        num_recursions=max(2, recursion.num_recursions),
        sharing="cycle",
        router=ExitGate(threshold, config.rms_norm_epsilon),
        loop_norm=True,
        sandwich_norms=True,
    )
    wanted = {field.name: getattr(same, field.name) for field in fields(same)}
    differing = [name for name, value in wanted.items() if getattr(recursion, name) != value]
    differing += [name for name in ("moe", "qkv_bias", "qk_norm") if getattr(config, name)]
    if differing:
        given = ", ".join(
            f"{name}={getattr(recursion if name in wanted else config, name)!r}" for name in differing
        )
        raise ValueError(
            f"{given} cannot be written as an Ouro, which loops its whole stack with sandwich norms, a "
            "norm after each loop, and an exit gate. Keep the model in our format."
        )
    schedule = config.schedule
    plain = replace(config, recursion=None, num_unrolled_layers=schedule.block_size)
    return llama_config(plain) | {
        "model_type": MODEL_TYPE,
        "architectures": ["OuroForCausalLM"],
        "num_hidden_layers": schedule.block_size,
        "layer_types": ["full_attention"] * schedule.block_size,
        "total_ut_steps": recursion.num_recursions,
        "early_exit_threshold": threshold,
    }


def ouro_names(config: DecoderConfig) -> dict[str, str]:
    """The name in an Ouro checkpoint of each of our tensors."""
    names = {"embedding.weight": "model.embed_tokens.weight"}
    for layer in range(config.schedule.block_size):
        ours, theirs = f"recursions.0.layers.layers.{layer}", f"model.layers.{layer}"
        names |= layer_names(config, ours, theirs)
        names |= {f"{ours}.{o}.weights.0": f"{theirs}.{t}.weight" for o, t in _SANDWICH.items()}
    names |= dict.fromkeys(("norm.weights.0", *_COPIES), _NORM)
    for part in ("weight", "bias"):
        names[f"recursions.0.router.{part}"] = f"{_GATE}.{part}"
    if not config.tie_embeddings:
        names["output.weight"] = "lm_head.weight"
    return names
