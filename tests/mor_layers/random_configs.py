"""Random settings of our dataclasses: mostly plausible ones, with a wrong value here and there.

Every field is drawn by its annotation, so that a new setting takes part without a line here.
"""

import dataclasses
import types
import typing
from typing import Any

from hypothesis import strategies as st

from mor_layers import DecoderConfig, RecursionConfig, RouterConfig
from mor_layers.models import ROPE_SCALINGS, LatentAttentionConfig, RopeScaling
from mor_layers.recursion import SHARING_SCHEMES
from mor_layers.routers import registered_routers

OURS = {
    name: kind
    for name, kind in registered_routers().items()
    if kind.__module__.startswith("mor_layers.")
}
"""Routers that check what they are given; other tests may have registered more."""
WRONG: list[Any] = ["2", "cycle", "", None, True, -1, 0, 1.5, -0.5, float("nan"), float("inf"), ()]
WRONG += [(1.0,), [1], {}, b"2", object, 200]
_INTS = [1, 2, 3, 4]
_FLOATS = [1e-3, 0.1, 0.5, 0.9, 1.0, 2.0]
PLAUSIBLE: dict[str, list[Any]] = {
    "vocab_size": [1, 7, 16],
    "ffn_hidden_size": [1, 5, 12],
    "warmup_steps": [0, 1, 3],
    "threshold": [0.1, 0.5, 0.9],
    "rate": [0.3, 1.0],
    "head_dim": [2, 6, 3],
    "dense_ends": [False, False, True],
    "prelude_layers": [0, 1, 2, 3],
    "coda_layers": [0, 1, 2, 3],
    "expert_routers": ["shared", "shared", "per_step"],
    "continue_shares": [0.2, 0.7],
    "capacity_factors": [0.3, 1.0],
    "capacity_multiple": [1, 4, 128],
    "capacity_factor": [0.3, 1.0, 2.0],
    "mean_experts": [1, 1.5, 2.0],
    "rope_base": [1, 100.0, 10000.0],
    "factor": [1.0, 4.0],
    "original_max_position_embeddings": [4, 64],
    "beta_fast": [2.0, 32.0],
    "beta_slow": [0.5, 1.0],
    "low_freq_factor": [0.5, 1.0],
    "high_freq_factor": [2.0, 4.0],
    "seed": [0, 7],
    "streams": [2, 3, 4],
    "window": [1, 1, 2],
    "anchor_every": [2, 3],
}
"""Values of fields of which others say little."""


@st.composite
def settings_of(draw: st.DrawFn, kind: type, wrong: float = 0.01, **given: Any) -> dict[str, Any]:
    """Arguments of the dataclass `kind`: `given`, what it needs, and about three of the others.

    More would rarely fit together, however many fields there are.
    """
    hints = typing.get_type_hints(kind)
    values = dict(given)
    rarity = max(3, len(hints) // 3)
    for field in dataclasses.fields(kind):
        has_default = field.default is not field.default_factory
        if field.name not in values and (not has_default or draw(st.integers(0, rarity)) == 0):
            values[field.name] = draw(_values(hints[field.name], field.name, wrong))
    for name in values:
        if draw(_chance(wrong)):
            values[name] = draw(st.sampled_from(WRONG))
    return values


@st.composite
def decoders(draw: st.DrawFn, wrong: float = 0.01) -> dict[str, Any]:
    """Arguments of DecoderConfig, nested ones as mappings, whose sizes mostly fit together."""
    heads = draw(st.sampled_from(_INTS))
    size = heads * draw(st.sampled_from([2, 4, 6]))
    recursion = None
    layers = draw(st.integers(1, 5))
    if draw(st.integers(0, 7)):
        steps = draw(st.sampled_from([1, 2, 2, 3, 3, 3, 4]))
        recursion = draw(recursions(steps, wrong))
        layers = _unshared(recursion) + draw(st.sampled_from([1, 2])) * steps
    sizes = {
        "hidden_size": draw(_mostly(size, [1, 3, 5])),
        "num_heads": heads,
        "num_unrolled_layers": draw(_mostly(layers, [1, 2, 7])),
        "recursion": recursion,
    }
    if draw(st.booleans()):
        sizes["moe"] = None
    if draw(st.integers(0, 7)):
        sizes["latent_attention"] = None
    else:
        latent = draw(settings_of(LatentAttentionConfig, wrong))
        sizes["latent_attention"] = latent | {"qk_rope_head_dim": draw(_mostly(2, [1, 4]))}
        if draw(st.integers(0, 4)):  # most of the time without what it refuses
            sizes |= {"num_kv_heads": None, "head_dim": None, "qkv_bias": False, "qk_norm": False}
    return draw(settings_of(DecoderConfig, wrong, **sizes))


@st.composite
def recursions(draw: st.DrawFn, steps: int, wrong: float) -> dict[str, Any]:
    """Arguments of RecursionConfig, for so many steps."""
    router = draw(routers(steps, wrong))
    sharing = draw(st.sampled_from([*["cycle", "middle_cycle"] * 4, *SHARING_SCHEMES]))
    values = draw(
        settings_of(RecursionConfig, wrong, num_recursions=steps, sharing=sharing, router=router)
    )
    if "sequence" in sharing and draw(st.integers(0, 4)):
        for name in ("residual_scale", "loop_loss", "hyper_connections", "history"):
            values.pop(name, None)
    if (steps > 1 or "sequence" not in sharing) and draw(st.integers(0, 4)):
        values.pop("anchor_every", None)
    if draw(st.integers(0, 9)):
        values.pop("block_layers", None)  # which rarely makes as many layers as the model has
    if router.get("backward_steps") is not None and draw(st.integers(0, 4)):
        values |= {"input_injection": True, "loop_loss": None}
    if steps < 3 and draw(st.integers(0, 4)):
        values.pop("history", None)
    loss = values.get("loop_loss")
    if isinstance(loss, dict) and draw(st.integers(0, 4)):
        is_uniform = loss.get("prior", "uniform") == "uniform"
        loss["rate"] = None if is_uniform else draw(st.sampled_from([0.2, 0.7]))
    return values


@st.composite
def routers(draw: st.DrawFn, steps: int, wrong: float) -> dict[str, Any]:
    """A router as YAML has it, for so many steps."""
    name = draw(st.sampled_from(sorted(OURS)))
    router = draw(settings_of(OURS[name], wrong))
    if router.get("teaching") and draw(st.integers(0, 4)):
        router["teaching"] = 0.0
    if name == "random_loops" and draw(st.integers(0, 4)):
        has_mean = router.get("draw") == "log_normal_poisson"
        router["mean"] = draw(st.sampled_from([0.5, 2.0])) if has_mean else None
    for field, count in (("capacity_factors", steps), ("continue_shares", steps - 1)):
        if isinstance(router.get(field), tuple) and draw(st.integers(0, 4)):
            shares = draw(
                st.lists(st.sampled_from([0.2, 0.5, 0.7]), min_size=count, max_size=count)
            )
            router[field] = tuple(sorted(shares, reverse=True))
    return router | {"type": name}


@st.composite
def rope_scalings(draw: st.DrawFn, wrong: float) -> dict[str, Any]:
    """Scaled rotary frequencies as YAML has them."""
    name = draw(st.sampled_from(sorted(ROPE_SCALINGS)))
    return draw(settings_of(ROPE_SCALINGS[name], wrong)) | {"rope_type": name}


def _unshared(recursion: dict[str, Any]) -> int:
    """Layers outside of it; where a wrong value was drawn, any number does."""
    by_scheme = int(str(recursion["sharing"]).startswith("middle"))
    given = (recursion.get(name) for name in ("prelude_layers", "coda_layers"))
    return sum(number if isinstance(number, int) else by_scheme for number in given)


def _values(hint: Any, name: str, wrong: float) -> st.SearchStrategy[Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(_values(a, name, wrong) for a in arguments)
    if name in PLAUSIBLE and origin is not tuple and hint is not types.NoneType:
        return st.sampled_from(PLAUSIBLE[name])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(
            _values(arguments[0], name, wrong), min_size=1, max_size=3, unique=True
        ).map(tuple)
    if hint is RopeScaling:
        return rope_scalings(wrong)
    if dataclasses.is_dataclass(hint):
        return settings_of(hint, wrong) if hint is not RouterConfig else routers(2, wrong)
    kinds = {bool: st.booleans(), int: st.sampled_from(_INTS), float: st.sampled_from(_FLOATS)}
    return kinds[hint] if hint in kinds else st.none()


def _chance(share: float) -> st.SearchStrategy[bool]:
    return st.integers(0, 999).map(lambda n: n >= 1000 - 1000 * share)


def _mostly(value: Any, others: list[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from([value] * 20 + others)
