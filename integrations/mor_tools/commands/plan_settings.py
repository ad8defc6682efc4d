"""What a plan reads of a YAML file of the pretraining script.

The sections that decide what a step costs, with the script's names and defaults; settings that cost
nothing are known by name and left alone, so that a misspelt one is still an error.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mor_layers import DecoderConfig, MoEConfig, RecursionConfig, from_mapping
from mor_layers.costs import RouterShape
from mor_tools.planner import PipelineLayout, Recompute, Workload

VOCABULARY_MULTIPLE = 128
"""The embedding is filled up to a multiple of this."""


@dataclass(frozen=True)
class Experts:
    """`model.moe`."""

    num_experts: int = 4
    experts_per_token: int = 2
    ffn_hidden_size: int = 256


@dataclass(frozen=True)
class Model:
    """`model`."""

    hidden_size: int = 192
    ffn_hidden_size: int = 512
    num_unrolled_layers: int = 8
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    moe: Experts | None = None


@dataclass(frozen=True)
class Parallel:
    """`parallel`: the file's own layout."""

    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    pipeline_layout: PipelineLayout = "one_stage"
    context: int = 1
    expert: int = 1
    distributed_optimizer: bool = False


@dataclass(frozen=True)
class Data:
    """`data`."""

    tokenizer: str | None = None
    vocabulary_size: int = 4096
    sequence_length: int = 256


@dataclass(frozen=True)
class Training:
    """`training`."""

    global_batch_size: int = 8
    micro_batch_size: int = 8
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Recompute = "none"


@dataclass(frozen=True)
class PlanSettings:
    """What a plan depends on."""

    model: Model = field(default_factory=Model)
    recursion: RecursionConfig | None = None
    parallel: Parallel = field(default_factory=Parallel)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)


WITHOUT_COST: dict[str, frozenset[str]] = {
    "": frozenset({"output", "evaluation", "log_every", "peak_tflops", "wandb", "uptrain"}),
    "model": frozenset({"rope_base", "rms_norm_epsilon"}),
    "model.moe": frozenset({"balance_coefficient", "z_loss_coefficient", "dispatcher"}),
    "parallel": frozenset({"overlap_grad_reduce"}),
    "data": frozenset(
        {
            "path",
            "end_of_document",
            "reset_attention_mask",
            "held_out_share",
            "loader",
            "prepared_folder",
            "workers",
        }
    ),
    "training": frozenset(
        {
            "steps",
            "stop_after",
            "timeout_seconds",
            "learning_rate",
            "final_learning_rate",
            "warmup_steps",
            "decay_steps",
            "weight_decay",
            "adam_beta2",
            "gradient_clip",
            "seed",
            "initial_weights",
            "checkpoint_every",
        }
    ),
}
"""Settings of the script that no plan depends on, by section."""


def read_settings(path: Path, changes: Sequence[str] = ()) -> PlanSettings:
    """The settings of a file, changed by `key=value`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a setting is unknown, of the wrong type, or not allowed.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file. Name a YAML file of the pretraining script."
        )
    for change in changes:
        if "=" not in change:
            raise ValueError(f"--set {change} is no key=value setting.")
    try:
        file = OmegaConf.load(path)
        if not isinstance(file, DictConfig):
            raise ValueError(f"{path}: expected a mapping of settings.")
        merged = OmegaConf.merge(file, OmegaConf.from_dotlist(list(changes)))
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    uptrain = values.get("uptrain")
    if isinstance(uptrain, dict) and uptrain.get("distillation_coefficient", 1.0):
        raise ValueError(
            "uptrain runs a teacher beside the model, which a plan does not count. Plan without it "
            "(--set uptrain=null), and leave room for its weights and forward pass."
        )
    return from_mapping(PlanSettings, _with_cost(values, ""), may_import=True)


def _with_cost(values: dict[str, Any], section: str) -> dict[str, Any]:
    kept = {}
    for name, value in values.items():
        inner = f"{section}.{name}" if section else name
        if name in WITHOUT_COST[section]:
            continue
        is_section = isinstance(value, dict) and inner in WITHOUT_COST
        kept[name] = _with_cost(value, inner) if is_section else value
    return kept


def workload(settings: PlanSettings, vocab_size: int | None = None) -> Workload:
    """What is trained, whatever the layout.

    Args:
        vocab_size: instead of the tokenizer's or the file's.
    """
    model, recursion = settings.model, settings.recursion
    unshared = 1 if recursion is None else recursion.schedule(model.num_unrolled_layers).prelude
    moe = model.moe
    experts = None
    if moe is not None:
        experts = MoEConfig(moe.num_experts, moe.experts_per_token, moe.ffn_hidden_size)
    size = vocab_size or _vocabulary(settings.data)
    decoder = DecoderConfig(
        vocab_size=-(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_unrolled_layers=model.num_unrolled_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
        tie_embeddings=model.tie_embeddings,
        recursion=recursion,
        moe=experts,
        dense_ends=experts is not None and unshared > 0,
    )
    return Workload(
        decoder,
        settings.data.sequence_length,
        settings.training.global_batch_size,
        settings.training.precision == "bf16",
        settings.parallel.distributed_optimizer,
        _tokens_per_step(recursion, model.hidden_size, settings.data.sequence_length),
    )


def _tokens_per_step(
    recursion: RecursionConfig | None, hidden_size: int, length: int
) -> tuple[float, ...] | None:
    """Where a router may keep any share: as its balancing aims at, equally many exit at each step."""
    shape = None if recursion is None else RouterShape.from_recursion(recursion, hidden_size)
    if recursion is None or shape is None or shape.capacity_factors is not None:
        return None
    steps = recursion.num_recursions
    return tuple(length * (steps - r) / steps for r in range(steps))


def _vocabulary(data: Data) -> int:
    if data.tokenizer is None:
        return data.vocabulary_size
    try:
        stored = json.loads(Path(data.tokenizer).read_text("utf-8"))
        ids = [*stored["model"]["vocab"].values(), *(t["id"] for t in stored["added_tokens"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"data.tokenizer={data.tokenizer} cannot be read for its size ({error!r}). "
            "Give --vocab-size."
        ) from error
    return max(ids) + 1
