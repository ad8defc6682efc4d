"""Random settings of the pretraining script as `key=value`, drawn by name and annotation."""

import dataclasses
import types
import typing
from typing import Any

from hypothesis import strategies as st

from mor_layers import RouterConfig
from mor_layers.models import RopeScaling
from mor_tools.pretraining.settings import Settings
from tests.mor_layers.random_configs import OURS

WRONG = ["abc", "-1", "0", "1.5", "-0.5", "nan", "inf", "[]", "{}", "null", "true", "7", "1000003"]
LEFT_OUT = {
    # Places and services of the machine; each has tests of its own.
    "output",
    "data.path",
    "data.prepared_folder",
    "data.tokenizer",
    "data.loader",
    "data.workers",
    "training.checkpoint_in_background",
    "training.initial_weights",
    "training.timeout_seconds",
    "wandb",
    "uptrain",
    # Relaxation, see layers/test_relaxation.py; a router around another, test_deepening.py.
    "recursion.relaxation",
    # Its sizes go together, see test_latent_attention.py.
    "model.latent_attention",
}
PLAUSIBLE: dict[str, list[Any]] = {
    "model.hidden_size": [16, 32, 48],
    "model.ffn_hidden_size": [3, 24, 64],
    "model.num_unrolled_layers": [4, 5, 6, 8],
    "model.num_heads": [1, 2, 4],
    "model.num_kv_heads": [1, 2, 4],
    "model.head_dim": ["null", 4, 6],
    "model.rms_norm_epsilon": [1e-6, 0.1],
    "model.rope_base": [1, 100, 50000],
    "model.rope_scaling": [
        "null",
        "{rope_type: linear, factor: 2}",
        "{rope_type: yarn, factor: 4, original_max_position_embeddings: 8}",
    ],
    "model.moe.ffn_hidden_size": [5, 16],
    "model.moe.num_experts": [2, 3, 4],
    "recursion.num_recursions": [1, 2, 3, 4],
    "recursion.prelude_layers": ["null", 0, 1, 2],
    "recursion.coda_layers": ["null", 0, 1, 2],
    "recursion.own_per_step": ["[]", "[attention]", "[mlp]"],
    "recursion.loop_loss.prior": ["uniform"],
    "recursion.loop_loss.rate": ["null"],
    "recursion.hyper_connections.streams": [2, 3],
    "recursion.norm_modulation.rank": [1, 4],
    "recursion.history.window": [1, 1, 2],
    "parallel.tensor": [1],
    "parallel.pipeline": [1],
    "parallel.context": [1],
    "parallel.expert": [1],
    "data.vocabulary_size": [257, 300],
    "data.sequence_length": [7, 16, 32],
    "data.held_out_share": [0.1, 0.3],
    "data.end_of_document": ["<|end|>", "<|endoftext|>"],
    "training.steps": [2, 3],
    "training.warmup_steps": [0, 1],
    "training.decay_steps": [0, 1],
    "training.stop_after": ["null", 1, 2],
    "training.global_batch_size": [2, 4],
    "training.learning_rate": [1e-3, 0.01],
    "training.final_learning_rate": [0.0, 1e-4],
    "training.gradient_clip": [0, 1.0],
    "training.seed": [0, 5],
    "evaluation.prompt": ["a", "red blue"],
    "evaluation.sample_tokens": [0, 1, 3],
    "evaluation.temperature": [0, 0.8],
}
SEVERAL = {
    "[{num_recursions: 2, block_layers: 1}, {num_recursions: 2, router: {type: expert_choice}}]": 8,
    "[{num_recursions: 3, sharing: cycle, block_layers: 1, router: {type: token_choice}}, "
    "{num_recursions: 2, sharing: sequence, kv_policy: recursion_wise}]": 7,
}
"""Several recursions, and a number of unrolled layers that fits."""
LAYOUT: dict[str, list[Any]] = {
    f"parallel.{name}": [1, 1, 2] for name in ("tensor", "pipeline", "context", "expert")
}
"""Besides, where there are two processes."""


def leaves(kind: type = Settings, prefix: str = "") -> dict[str, Any]:
    """Every setting below a dataclass, with its annotation; a router is one setting."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        path = f"{prefix}{name}"
        nested = next(filter(dataclasses.is_dataclass, typing.get_args(hint) or (hint,)), None)
        if path in LEFT_OUT:
            continue
        if nested is None or nested in (RouterConfig, RopeScaling):
            found[path] = hint
        else:
            found |= leaves(nested, f"{path}.")
    return found


@st.composite
def overrides(draw: st.DrawFn, layouts: bool = False, wrong: float = 0.06) -> list[str]:
    """Some `key=value`, a few of them wrong."""
    table = leaves()
    names = draw(st.lists(st.sampled_from(sorted(table)), max_size=10, unique=True))
    plausible = PLAUSIBLE | (LAYOUT if layouts else {})
    if layouts:
        names = sorted({*names, *LAYOUT})
    chosen: dict[str, Any] = {}
    for name in names:
        if draw(_chance(wrong)):
            chosen[name] = draw(st.sampled_from(WRONG))
        elif table[name] is RouterConfig:
            chosen |= draw(_router(name))
        else:
            values = plausible.get(name)
            chosen[name] = draw(_values(table[name]) if values is None else st.sampled_from(values))
    if draw(_chance(0.08)):
        chosen = {k: v for k, v in chosen.items() if not k.startswith("recursion.")}
        chosen["recursion"] = draw(st.sampled_from(sorted(SEVERAL)))
        chosen["model.num_unrolled_layers"] = SEVERAL[chosen["recursion"]]
    for name in ("recursion", "model.moe"):
        if draw(_chance(0.2)):
            chosen = {k: v for k, v in chosen.items() if not k.startswith(f"{name}.")}
            chosen[name] = "null"
    return [f"{name}={_shown(value)}" for name, value in chosen.items()]


@st.composite
def _router(draw: st.DrawFn, path: str) -> dict[str, Any]:
    name = draw(st.sampled_from(sorted(set(OURS) - {"deepened"})))
    hints = typing.get_type_hints(OURS[name])
    chosen: dict[str, Any] = {f"{path}.type": name}
    for field in (
        draw(st.lists(st.sampled_from(sorted(hints)), max_size=2, unique=True)) if hints else ()
    ):
        chosen[f"{path}.{field}"] = draw(_values(hints[field]))
    return chosen


def _values(hint: Any) -> st.SearchStrategy[Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(_values(argument) for argument in arguments)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        shares = st.lists(st.sampled_from([0.2, 0.5, 1.0]), min_size=1, max_size=3)
        return shares.map(lambda values: sorted(values, reverse=True))
    kinds = {
        bool: st.booleans(),
        int: st.sampled_from([1, 2, 3]),
        float: st.sampled_from([0.01, 0.5, 1.0, 1.5]),
        types.NoneType: st.just("null"),
        str: st.just("text"),
    }
    return kinds[hint]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _chance(share: float) -> st.SearchStrategy[bool]:
    return st.integers(0, 999).map(lambda n: n >= 1000 - 1000 * share)
