"""Reads published looped checkpoints as recursive models, and writes such models: Ouro and Nanbeige4.2.

Both run their whole stack several times and apply the model's last norm after every loop, so that
the later loops start from normalised states: that is our `loop_norm`. Ouro (Zhu et al. 2025, arXiv
2510.25741; config and tensors as in ByteDance/Ouro-1.4B) also has a norm on both sides of attention
and MLP, and an exit gate, which reads the normalised state. Nanbeige4.2 (arXiv 2607.22083;
Nanbeige/Nanbeige4.2-3B) has the layers of a Llama. One norm of theirs is up to three tensors of
ours, which must be equal for a model to be written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor_huggingface.checkpoints.llama import config_from_llama, llama_config
from mor_layers import DecoderConfig, FixedDepth, RecursionConfig, RouterConfig
from mor_layers.routers import ExitGate
from mor_layers.settings.field_types import shown
from mor_layers.weights import (
    CONFIG,
    LazyTensors,
    StoredModel,
    carried,
    dtype_name,
    fitting,
    layer_names,
    model_type_of,
    open_tensors,
    read_config,
    require_layers,
    require_supported,
    side_files,
    write_folder,
)

_LAST_NORM = "norm.weights.0"
_LOOP_NORM = "recursions.0.step_input.norms.0"
_GATE = "model.early_exit_gate"
_SANDWICH = {
    "attention_output_norm": "input_layernorm_2",
    "mlp_output_norm": "post_attention_layernorm_2",
}
_LOOPS = range(2, 65)
"""Numbers of loops that are read."""
_OTHER_MODELS = {
    "dory": "Dory keeps its states on a sphere (nGPT) and gates the outputs of attention",
    "hrm_text": "HRM-Text nests two loops of different speed",
}
"""Looped models that our blocks do not express, and why."""


@dataclass(frozen=True)
class Family:
    """A kind of published looped model."""

    model_type: str
    """In config.json; also the name of the format."""
    architecture: str
    """Name of the model class in config.json."""
    loops: str
    """Field of config.json with the number of loops."""
    is_ouro: bool
    """Whether it has sandwich norms and an exit gate."""
    only: Mapping[str, Any]
    """The only supported value of each of these fields, if the field is given."""

    @property
    def copies(self) -> tuple[str, ...]:
        """Our tensors that are equal to the last norm."""
        return (_LOOP_NORM, *(("recursions.0.router.norm",) if self.is_ouro else ()))


OURO = Family("ouro", "OuroForCausalLM", "total_ut_steps", True, {"early_exit_step": None})
NANBEIGE = Family(
    "nanbeige",
    "NanbeigeForCausalLM",
    "num_loops",
    False,
    {
        "qk_layernorm": False,
        "skip_loop_final_norm": False,
        "enable_double_loop_split": False,
        "loop_share_kv": False,
        "enable_hyper_connection": False,
        "enable_depth_attention": False,
        "ngram_vocab_size_ratio": None,
        "emb_neighbor_num": None,
    },
)
FAMILIES = {family.model_type: family for family in (OURO, NANBEIGE)}


def refuse_other_loops(folder: Path) -> None:
    """Raise ValueError if a folder has a looped model that our blocks do not express."""
    kind = model_type_of(folder)
    if kind in _OTHER_MODELS:
        raise ValueError(
            f"{folder / CONFIG}: model_type={kind!r} cannot be converted: {_OTHER_MODELS[kind]}, which "
            f"the blocks here do not. Looped models that can be are {', '.join(FAMILIES)}."
        )


def open_looped(folder: Path) -> StoredModel:
    """Open a looped checkpoint. Its tensors are read on access.

    Raises:
        ValueError: a setting is not supported, or a file is missing or damaged.
        FileNotFoundError: the folder does not exist.
    """
    values = read_config(folder)
    config = config_from_looped(values, str(folder / CONFIG))
    tensors = open_tensors(folder)
    require_layers(config, len(tensors), folder)
    kept = [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        return tensor[0] if name == f"{_GATE}.weight" and tensor.shape[:1] == (1,) else tensor

    names = looped_names(config, FAMILIES[values["model_type"]])
    weights = fitting(config, names, LazyTensors(kept, read), folder)
    return StoredModel(config, weights, carried(values), side_files(folder))


def write_looped(
    family: Family, model: StoredModel, folder: Path, written: Callable[[str], None] | None = None
) -> None:
    """Write a looped checkpoint into an existing folder, tensor by tensor.

    Raises:
        ValueError: the model is not of this family.
    """
    values = looped_config(family, model.config)
    last = model.weights[_LAST_NORM]
    for name in family.copies:
        if not torch.equal(model.weights[name].to(last.dtype), last):
            raise ValueError(
                f"{name} differs from {_LAST_NORM}, and {family.model_type} has one norm for both. Keep "
                "the model in our format."
            )
    ours = looped_names(model.config, family)
    names = {theirs: own for own, theirs in ours.items() if own not in family.copies}

    def read(name: str) -> Tensor:
        tensor = model.weights[names[name]]
        if name.startswith(_GATE):  # a buffer, which keeps its precision where weights are cast
            tensor = tensor.to(last.dtype)
        return tensor[None] if name == f"{_GATE}.weight" else tensor

    values |= {"dtype": dtype_name(model), **model.facts}
    write_folder(model, folder, values, LazyTensors(list(names), read), written)


def config_from_looped(values: Mapping[str, Any], where: str = CONFIG) -> DecoderConfig:
    """Convert the settings in the config.json of an Ouro or a Nanbeige to a DecoderConfig.

    Raises:
        ValueError: a setting is missing or not supported.
    """
    family = FAMILIES[values["model_type"]]
    only = {"layer_types": None, **family.only}
    if set(values.get("layer_types") or ()) == {"full_attention"}:
        only.pop("layer_types")
    require_supported(values, only, where)
    loops = values.get(family.loops)
    if not isinstance(loops, int) or loops not in _LOOPS:
        raise ValueError(
            f"{where}: {family.loops}={shown(loops)} must be an integer from {_LOOPS[0]} to "
            f"{_LOOPS[-1]}."
        )
    threshold = values.get("early_exit_threshold")
    threshold = 1.0 if threshold is None else threshold
    if not isinstance(threshold, int | float):
        raise ValueError(f"{where}: early_exit_threshold={shown(threshold)} must be a number.")
    # Apart from the loops, the settings have the names of a Llama's.
    plain = config_from_llama({**values, "model_type": "llama"}, where)
    recursion = _recursion(family, loops, float(threshold), plain.rms_norm_epsilon)
    layers_run = plain.num_unrolled_layers * loops
    return replace(plain, recursion=recursion, num_unrolled_layers=layers_run)


def looped_config(family: Family, config: DecoderConfig) -> dict[str, Any]:
    """Convert a DecoderConfig to the settings of an Ouro or a Nanbeige.

    Raises:
        ValueError: the model is not of this family; the message names the settings that differ.
    """
    config.only_recursion(family.model_type)
    recursion = replace(config.effective_recursion, block_layers=None)  # which all layers are
    router = recursion.router
    threshold = router.threshold if isinstance(router, ExitGate) else 1.0
    loops = max(_LOOPS[0], recursion.num_recursions)
    same = _recursion(family, loops, threshold, config.rms_norm_epsilon)
    pairs = [(field.name, getattr(recursion, field.name)) for field in fields(same)]
    differing = [f"{name}={value!r}" for name, value in pairs if value != getattr(same, name)]
    beyond = ("moe", "qkv_bias", "qk_norm", "sum_norms")
    differing += [f"{name}={getattr(config, name)!r}" for name in beyond if getattr(config, name)]
    if differing:
        with_gate = " with sandwich norms and an exit gate" if family.is_ouro else ""
        raise ValueError(
            f"{', '.join(differing)} cannot be written as {family.model_type}, which loops its whole "
            f"stack{with_gate} and has a norm after each loop. Keep the model in our format."
        )
    size = config.schedule.block_size
    plain = llama_config(replace(config, recursion=None, num_unrolled_layers=size))
    named = {"model_type": family.model_type, "architectures": [family.architecture]}
    values = plain | named | {family.loops: recursion.num_recursions}
    if family.is_ouro:
        values |= {"layer_types": ["full_attention"] * size, "early_exit_threshold": threshold}
    else:
        values |= {"skip_loop_final_norm": False}
    return values


def looped_names(config: DecoderConfig, family: Family) -> dict[str, str]:
    """The name in a checkpoint of this family of each of our tensors."""
    names = {"embedding.weight": "model.embed_tokens.weight"}
    for layer in range(config.schedule.block_size):
        ours, theirs = f"recursions.0.layers.layers.{layer}", f"model.layers.{layer}"
        names |= layer_names(config, ours, theirs)
        if family.is_ouro:
            names |= {f"{ours}.{o}.weights.0": f"{theirs}.{t}.weight" for o, t in _SANDWICH.items()}
    names |= dict.fromkeys((_LAST_NORM, *family.copies), "model.norm.weight")
    if family.is_ouro:
        for part in ("weight", "bias"):
            names[f"recursions.0.router.{part}"] = f"{_GATE}.{part}"
    if not config.tie_embeddings:
        names["output.weight"] = "lm_head.weight"
    return names


def _recursion(family: Family, loops: int, threshold: float, epsilon: float) -> RecursionConfig:
    router: RouterConfig = ExitGate(threshold, epsilon) if family.is_ouro else FixedDepth()
    return RecursionConfig(loops, "cycle", router, loop_norm=True, sandwich_norms=family.is_ouro)
