"""Settings that do not match in a quantity that should be equal: by how much, and what to change."""

import typing
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from mor_layers.recursion import KVPolicy
from mor_tools.comparison.costs import Costs
from mor_tools.pretraining.settings import Settings

if TYPE_CHECKING:
    from mor_tools.comparison.plan import Model

_WIDTHS = 8
"""Suggested widths are multiples of this."""


def to_match(
    reference: "Model", model: "Model", quantity: str, called: str, tolerance: float
) -> None:
    """Raise ValueError if a model does not match the reference in a quantity.

    Args:
        quantity: `parameters` or `kv`.
        called: what the quantity is called in a sentence.
        tolerance: largest relative deviation.
    """
    wanted, found = (_amount(m.settings, quantity) for m in (reference, model))
    deviation = found / wanted - 1
    if abs(deviation) <= tolerance:
        return
    more = "more" if deviation > 0 else "fewer"
    raise ValueError(
        f"{model.name} has {abs(deviation):.1%} {more} {called} than {reference.name} "
        f"({found:,.0f} against {wanted:,.0f}), and --tolerance allows {tolerance:.1%}. "
        f"{_advice(model.settings, quantity, wanted)}"
    )


def _amount(settings: Settings, quantity: str) -> float:
    costs = Costs(settings)
    return costs.parameters if quantity == "parameters" else costs.kv_bytes


def _advice(settings: Settings, quantity: str, wanted: float) -> str:
    """The one change of a setting that comes nearest."""
    options = _widths(settings, wanted) if quantity == "parameters" else _caches(settings)
    nearest = min(
        ((text, _amount(changed, quantity) / wanted - 1) for text, changed in options),
        key=lambda option: abs(option[1]),
        default=None,
    )
    rest = (
        "model.hidden_size and model.num_unrolled_layers"
        if quantity == "parameters"
        else "model.head_dim and model.num_unrolled_layers"
    )
    if nearest is None:
        return f"Change {rest}."
    return f"With {nearest[0]} the difference would be {nearest[1]:+.1%}; {rest} change it too."


def _widths(settings: Settings, wanted: float) -> Iterable[tuple[str, Settings]]:
    """The width of the MLPs or experts, in which the number of parameters is linear."""
    model = settings.model
    owner = "model" if model.moe is None else "model.moe"
    width = (model if model.moe is None else model.moe).ffn_hidden_size

    def with_width(value: int) -> Settings:
        if model.moe is None:
            return replace(settings, model=replace(model, ffn_hidden_size=value))
        moe = replace(model.moe, ffn_hidden_size=value)
        return replace(settings, model=replace(model, moe=moe))

    now = _amount(settings, "parameters")
    slope = (_amount(with_width(width + _WIDTHS), "parameters") - now) / _WIDTHS
    value = _WIDTHS * round((width + (wanted - now) / slope) / _WIDTHS)
    if value >= _WIDTHS:
        yield f"{owner}.ffn_hidden_size={value}", with_width(value)


def _caches(settings: Settings) -> Iterable[tuple[str, Settings]]:
    """Other numbers of key-value heads, and other KV policies."""
    model = settings.model
    # Latent attention has one row per token, whatever the number of heads.
    most = model.num_heads if model.latent_attention is None else 0
    for heads in range(1, most + 1):
        if model.num_heads % heads == 0 and heads != model.num_kv_heads:
            changed = replace(settings, model=replace(model, num_kv_heads=heads))
            yield f"model.num_kv_heads={heads}", changed
    recursions = settings.recursions
    for index, policy in product(range(len(recursions)), typing.get_args(KVPolicy)):
        try:
            own = replace(recursions[index], kv_policy=policy)
            others = recursions[:index], recursions[index + 1 :]
            changed = replace(settings, recursion=(*others[0], own, *others[1]))
        except ValueError:
            continue  # a policy that these settings refuse
        place = "recursion" if len(recursions) == 1 else f"recursion[{index}]"
        yield f"{place}.kv_policy={policy}", changed
