"""Reads Huginn checkpoints (`huginn_raven`) as recursive models, and writes such models.

Source: Geiping et al. 2025 (arXiv 2502.05171); config and tensors as in tomg-group-umd/huginn-0125. Two
layers before and after a block of four, which runs `mean_recurrence` times. Before each loop, a matrix
projects the state and the prelude's output together (our `adapter`); every layer normalises sums of
residual and branch (`sum_norms`); embeddings are multiplied by the root of their size; and one norm
comes after the last loop (`exit_norm`) and after the coda, which is two tensors of ours.

Their state begins as noise. Ours begins at zero in evaluation, which is theirs with `init_scale=0`, and
is drawn in training. Their queries and keys have biases and values have none: ours have a bias of zero.
Their rotary pairs are neighbours, ours halves of a head, so rows of queries and keys change places.

Legend: `n` heads, `d` head size, `h` hidden, `f` width of the MLP.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor_layers import DecoderConfig, FixedDepth, RecursionConfig
from mor_layers.recursion import StateAdapter
from mor_layers.settings.field_types import shown
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
    require_supported,
    side_files,
    write_folder,
)

MODEL_TYPE = "huginn_raven"
_LAST_NORM, _EXIT_NORM = "norm.weights.0", "coda.input_norm.weights.0"
_ROTARY = "freqs_cis"
_LENGTH = "max_position_embeddings"
"""Our name for their `block_size`, the longest sequence."""
_LOOPS = range(2, 257)
"""Numbers of loops that are read."""
_DEVIATION = math.sqrt(2 / 5)
"""Standard deviation of their initial state, whatever the size: that of a new embedding, scaled."""
_NORMS = {
    "attention_norm": "norm_1",
    "attention_sum_norm": "norm_2",
    "mlp_norm": "norm_3",
    "mlp_sum_norm": "norm_4",
}
_ONLY: dict[str, Any] = {
    "bias": False,
    "qk_bias": True,
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "state_init": "like-init",
    "test_time_noise": 0,
}
"""The only supported value of each of these fields, if the field is given."""
_OTHER_NAMES = {"n_embd": "hidden_size", "n_heads": "num_attention_heads"}
"""Names that transformers gives fields of theirs in some files."""

Part = tuple[str, Callable[[Tensor], Tensor]]
"""The name of a tensor of theirs, and what makes ours of it."""


def open_huginn(folder: Path) -> StoredModel:
    """Open a Huginn checkpoint. Its tensors are read on access.

    Raises:
        ValueError: a setting is not supported, or a file is missing or damaged.
        FileNotFoundError: the folder does not exist.
    """
    values = read_config(folder)
    config = config_from_huginn(values, str(folder / CONFIG))
    tensors = open_tensors(folder)
    require_layers(config, len(tensors), folder)
    parts = _parts(config)
    used = {theirs for theirs, _ in parts.values()} | {_ROTARY}
    used |= {"lm_head.weight"} if config.tie_embeddings else set()
    unknown = [name for name in tensors if name not in used]
    if unknown:
        raise ValueError(f"{folder}: a Huginn with its settings has no tensor {shown(unknown[0])}.")
    present = {ours: part for ours, part in parts.items() if part[0] in tensors}

    def read(ours: str) -> Tensor:
        theirs, make = present[ours]
        try:
            return make(tensors[theirs])
        except RuntimeError as error:
            shape = tuple(tensors[theirs].shape)
            raise ValueError(
                f"{folder}: {theirs!r} has shape {shape}, which does not fit."
            ) from error

    weights = fitting(
        config, {name: name for name in parts}, LazyTensors(list(present), read), folder
    )
    facts = carried(values) | {_LENGTH: values.get("block_size", 4096)}
    return StoredModel(config, weights, facts, side_files(folder))


def write_huginn(
    model: StoredModel, folder: Path, written: Callable[[str], None] | None = None
) -> None:
    """Write a Huginn checkpoint into an existing folder, tensor by tensor.

    Raises:
        ValueError: the model is not a Huginn.
    """
    config, weights = model.config, model.weights
    values = huginn_config(config)
    if not torch.equal(weights[_EXIT_NORM], weights[_LAST_NORM]):
        raise ValueError(
            f"{_EXIT_NORM} differs from {_LAST_NORM}, and a Huginn has one norm for both. Keep the "
            "model in our format."
        )
    length = int(model.facts.get(_LENGTH, 4096))
    dtype = weights["embedding.weight"].dtype
    makers: dict[str, Callable[[], Tensor]] = {
        "transformer.wte.weight": lambda: weights["embedding.weight"],
        "transformer.adapter.weight": lambda: weights["recursions.0.step_input.projections.0"],
        "transformer.ln_f.weight": lambda: weights[_LAST_NORM],
        _ROTARY: lambda: _rotations(config, length).to(dtype),
    }
    if not config.tie_embeddings:
        makers["lm_head.weight"] = lambda: weights["output.weight"]
    for ours, theirs in _layers(config).items():
        makers |= _makers_of_layer(config, weights, ours, theirs)
    tensors = LazyTensors(list(makers), lambda name: makers[name]().contiguous())
    facts = {name: value for name, value in model.facts.items() if name != _LENGTH}
    values |= {"block_size": length, "torch_dtype": dtype_name(model), **facts}
    write_folder(model, folder, values, tensors, written)


def config_from_huginn(values: Mapping[str, Any], where: str = CONFIG) -> DecoderConfig:
    """Convert the settings in a Huginn's config.json to a DecoderConfig.

    Raises:
        ValueError: a setting is missing or not supported.
    """
    values = dict(values)
    for name, other in _OTHER_NAMES.items():
        values.setdefault(name, values.get(other))
    heads = values["n_heads"]
    given = {name: value for name, value in values.items() if value is not None}
    require_supported(given, _ONLY | {"num_key_value_heads": heads}, where)
    names = (
        "vocab_size", "n_embd", "n_heads", "intermediate_size", "n_layers_in_prelude",
        "n_layers_in_recurrent_block", "n_layers_in_coda", "mean_recurrence",
    )  # fmt: skip
    for name in names:
        if not isinstance(values.get(name), int):
            raise ValueError(f"{where}: {name}={shown(values.get(name))} must be an integer.")
    loops = values["mean_recurrence"]
    if loops not in _LOOPS:
        raise ValueError(
            f"{where}: mean_recurrence={loops} must lie between {_LOOPS[0]} and {_LOOPS[-1]}."
        )
    prelude, coda = values["n_layers_in_prelude"], values["n_layers_in_coda"]
    base, epsilon = values.get("rope_base", 50_000), values.get("norm_eps", 1e-6)
    for name, value in (("rope_base", base), ("norm_eps", epsilon)):
        if not isinstance(value, int | float):
            raise ValueError(f"{where}: {name}={shown(value)} must be a number.")
    tied = values.get("tie_embeddings", values.get("tie_word_embeddings", True))
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["n_embd"],
        ffn_hidden_size=values["intermediate_size"],
        num_unrolled_layers=prelude + loops * values["n_layers_in_recurrent_block"] + coda,
        num_heads=heads,
        num_kv_heads=heads,
        qkv_bias=True,
        rms_norm_epsilon=float(epsilon),
        rope_base=float(base),
        tie_embeddings=bool(tied),
        recursion=_recursion(loops, prelude, coda),
        embedding_scale=math.sqrt(values["n_embd"]),
        sum_norms=True,
    )


def huginn_config(config: DecoderConfig) -> dict[str, Any]:
    """Convert a DecoderConfig to the settings of a Huginn.

    Raises:
        ValueError: the model is not a Huginn; the message names the settings that differ.
    """
    schedule, loops = config.schedule, config.effective_recursion.num_recursions
    values = {
        "model_type": MODEL_TYPE,
        "architectures": ["RavenForCausalLM"],
        "auto_map": {
            "AutoConfig": "raven_config_minimal.RavenConfig",
            "AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM",
        },
        **_ONLY,
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_heads": config.num_heads,
        "n_layers": schedule.prelude + schedule.block_size + schedule.coda,
        "intermediate_size": config.ffn_hidden_size,
        "n_layers_in_prelude": schedule.prelude,
        "n_layers_in_recurrent_block": schedule.block_size,
        "n_layers_in_coda": schedule.coda,
        "mean_recurrence": loops,
        "norm_eps": config.rms_norm_epsilon,
        "rope_base": config.rope_base,
        "tie_embeddings": config.tie_embeddings,
    }
    same = config_from_huginn(values | {"mean_recurrence": max(loops, _LOOPS[0])})
    pairs = [
        (config, same, vars(same)),
        (config.effective_recursion, same.recursion, vars(same.recursion)),
    ]
    given = [
        f"{name}={getattr(own, name)!r}"
        for own, theirs, names in pairs
        for name in names
        if name not in ("recursion", "adapter", "num_kv_heads")
        and getattr(own, name) != getattr(theirs, name)
    ]
    given += ["adapter=None"] if config.effective_recursion.adapter is None else []
    given += [f"num_kv_heads={config.kv_heads}"] if config.kv_heads != config.num_heads else []
    if given:
        raise ValueError(
            f"{', '.join(given)} cannot be written as {MODEL_TYPE}. Keep the model in our format."
        )
    return values


def _recursion(loops: int, prelude: int, coda: int) -> RecursionConfig:
    return RecursionConfig(
        loops,
        "middle_cycle",
        FixedDepth(),
        prelude_layers=prelude,
        coda_layers=coda,
        adapter=StateAdapter(_DEVIATION),
        exit_norm=True,
    )


def _layers(config: DecoderConfig) -> dict[str, str]:
    """Their name of each layer."""
    schedule = config.schedule
    return {
        f"{ours}.{layer}": f"transformer.{theirs}.{layer}"
        for ours, theirs, number in (
            ("prelude.layers", "prelude", schedule.prelude),
            ("recursions.0.layers.layers", "core_block", schedule.block_size),
            ("coda.layers", "coda", schedule.coda),
        )
        for layer in range(number)
    }


def _parts(config: DecoderConfig) -> dict[str, Part]:
    """What each tensor of ours is made of."""

    def whole(tensor: Tensor) -> Tensor:
        return tensor

    parts: dict[str, Part] = {
        "embedding.weight": ("transformer.wte.weight", whole),
        "recursions.0.step_input.projections.0": ("transformer.adapter.weight", whole),
        _EXIT_NORM: ("transformer.ln_f.weight", whole),
        _LAST_NORM: ("transformer.ln_f.weight", whole),
    }
    if not config.tie_embeddings:
        parts["output.weight"] = "lm_head.weight", whole
    for ours, theirs in _layers(config).items():
        for name, norm in _NORMS.items():
            parts[f"{ours}.{name}.weights.0"] = f"{theirs}.{norm}.weight", whole
        for place, name in enumerate(("query", "key", "value")):
            fused, biases = f"{theirs}.attn.Wqkv.weight", f"{theirs}.attn.qk_bias"
            parts[f"{ours}.attention.{name}.weight"] = fused, _Third(config, place)
            parts[f"{ours}.attention.{name}.bias"] = biases, _Bias(config, place)
        parts[f"{ours}.attention.output.weight"] = f"{theirs}.attn.proj.weight", whole
        for place, name in enumerate(("gate", "up")):
            parts[f"{ours}.mlp.{name}.weight"] = f"{theirs}.mlp.fc.weight", _Half(place)
        parts[f"{ours}.mlp.down.weight"] = f"{theirs}.mlp.proj.weight", whole
    return parts


class _Third:
    """Rows of queries (0), keys (1) or values (2) of `[3h h]`, in our order."""

    def __init__(self, config: DecoderConfig, place: int) -> None:
        self.heads, self.place = config.num_heads, place

    def __call__(self, fused: Tensor) -> Tensor:
        rows = fused.unflatten(0, (3, -1))[self.place]
        return rows if self.place == 2 else _halves(rows, self.heads)


class _Bias:
    """Biases of queries (0) or keys (1) of `[2 1 n d]`; of values (2), zero."""

    def __init__(self, config: DecoderConfig, place: int) -> None:
        self.heads, self.place = config.num_heads, place

    def __call__(self, biases: Tensor) -> Tensor:
        if self.place == 2:
            return torch.zeros_like(biases[0].flatten())
        return _halves(biases[self.place].flatten(), self.heads)


class _Half:
    """The gate (0) or the other projection (1) of `[2f h]`."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __call__(self, fused: Tensor) -> Tensor:
        return fused.unflatten(0, (2, -1))[self.place]


def _makers_of_layer(
    config: DecoderConfig, weights: Mapping[str, Tensor], ours: str, theirs: str
) -> dict[str, Callable[[], Tensor]]:
    """What makes each of their tensors of a layer."""
    heads, attention = config.num_heads, f"{ours}.attention"

    def fused() -> Tensor:
        query, key = (
            _neighbours(weights[f"{attention}.{name}.weight"], heads) for name in ("query", "key")
        )
        return torch.cat([query, key, weights[f"{attention}.value.weight"]])

    def biases() -> Tensor:
        if weights[f"{attention}.value.bias"].any():
            raise ValueError(
                f"{attention}.value.bias is not zero, and a Huginn has no such bias. Keep the model in "
                "our format."
            )
        rows = [
            _neighbours(weights[f"{attention}.{name}.bias"], heads) for name in ("query", "key")
        ]
        return torch.stack(rows).unflatten(1, (heads, -1))[:, None]  # [2 h] -> [2 1 n d]

    def gated() -> Tensor:
        return torch.cat([weights[f"{ours}.mlp.{name}.weight"] for name in ("gate", "up")])

    makers: dict[str, Callable[[], Tensor]] = {
        f"{theirs}.attn.Wqkv.weight": fused,
        f"{theirs}.attn.qk_bias": biases,
        f"{theirs}.mlp.fc.weight": gated,
    }
    same = {
        "attention.output.weight": "attn.proj.weight",
        "mlp.down.weight": "mlp.proj.weight",
        **{f"{name}.weights.0": f"{norm}.weight" for name, norm in _NORMS.items()},
    }
    for own, other in same.items():
        makers[f"{theirs}.{other}"] = lambda name=f"{ours}.{own}": weights[name]
    return makers


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of heads whose rotary pairs are neighbours, in the order in which pairs are halves."""
    pairs = rows.unflatten(0, (heads, -1, 2))  # [nd ...] -> [n d/2 2 ...]
    return pairs.transpose(1, 2).flatten(0, 2)


def _neighbours(rows: Tensor, heads: int) -> Tensor:
    """The opposite of `_halves`."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _rotations(config: DecoderConfig, length: int) -> Tensor:
    """Cosine and sine of every position and pair, `[1 s 1 d/2 2]`, which their files hold."""
    size = config.head_size
    speeds = 1.0 / (config.rope_base ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    angles = torch.outer(torch.arange(length, dtype=torch.float32), speeds)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None]
