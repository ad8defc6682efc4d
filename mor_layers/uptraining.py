"""Weights of a recursive model from those of a dense one.

Sources: Bae et al. 2024 (Relaxed Recursive Transformers, arXiv 2410.20672), section 2.2, and Bae
et al. 2025 (arXiv 2507.10524). With 6 shared layers in 3 recursions a block of two gets:

    stepwise  1 6          layers at even distances, the first and the last among them
    average   the mean of the layers that each one stands for under the sharing scheme
    lower     1 2
    upper     5 6
    random    fresh weights

Layers outside the block, embeddings and the last norm are the dense model's. A block of one layer
takes the first for `stepwise`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from mor_layers.config import DecoderConfig, RecursionConfig
from mor_layers.published import layer_names
from mor_layers.tensor_files import LazyTensors
from mor_layers.transformer import MoRTransformer

Initialization = Literal["stepwise", "average", "lower", "upper", "random"]
INITIALIZATIONS: tuple[str, ...] = get_args(Initialization)


def unrolled_layers(config: DecoderConfig) -> list[tuple[str, int]]:
    """Name of the layer that runs at each depth, and which of its norms runs there."""
    recursion, schedule = config.effective_recursion, config.schedule
    steps, size = range(recursion.num_recursions), range(schedule.block_size)
    if schedule.is_cyclic:
        shared = [(f"recursions.0.layers.layers.{layer}", step) for step in steps for layer in size]
    else:
        shared = [(f"recursions.{layer}.layers.layers.0", step) for layer in size for step in steps]
    if recursion.share_norms:
        shared = [(name, 0) for name, _ in shared]
    first = [(f"prelude.layers.{layer}", 0) for layer in range(schedule.prelude)]
    last = [(f"coda.layers.{layer}", 0) for layer in range(schedule.coda)]
    return first + shared + last


def recursive_weights(
    weights: Mapping[str, Tensor],
    dense: DecoderConfig,
    recursion: RecursionConfig,
    initialization: Initialization,
    seed: int = 0,
) -> tuple[DecoderConfig, LazyTensors]:
    """Settings and weights of a recursive model that begins where a dense one ended.

    Norms of single steps (`share_norms=False`) are those of the layers at their depths, whatever
    the initialization, `random` excepted. A router is new, from `seed`.

    Args:
        weights: of the dense model, by the names of a MoRTransformer's state dict.
        dense: its settings.

    Raises:
        ValueError: the model is no dense one, its layers do not divide into such recursions, or
            the initialization is unknown.
    """
    if initialization not in INITIALIZATIONS:
        raise ValueError(
            f"initialization={initialization!r} is unknown. Use one of "
            f"{', '.join(INITIALIZATIONS)}."
        )
    if dense.recursion is not None or dense.moe is not None:
        raise ValueError(
            "a recursive model begins from a dense one, and this one has a recursion or experts. "
            "Give settings with recursion=None and moe=None."
        )
    config = replace(dense, recursion=recursion)
    sources = _sources(dense, config, initialization)
    routers = _routers(config, seed)
    with torch.device("meta"):
        state = MoRTransformer(config).state_dict()
    if config.tie_embeddings:
        del state["output.weight"]
    seeds = {name: seed * len(state) + place for place, name in enumerate(state)}
    shared = {name for name in sources if name.startswith("recursions.")}

    def make(name: str) -> Tensor:
        if name in routers:
            return routers[name]
        parts = [weights[source] for source in sources.get(name, [name])]
        if initialization == "random" and name in shared:
            return _random(parts[0], seeds[name])
        return parts[0] if len(parts) == 1 else _mean(parts)

    return config, LazyTensors(list(state), make)


def _sources(
    dense: DecoderConfig, config: DecoderConfig, initialization: Initialization
) -> dict[str, list[str]]:
    """For each tensor of the recursive model's layers, those of the dense model it comes from."""
    schedule = config.schedule
    theirs = [name for name, _ in unrolled_layers(dense)]
    depths: dict[str, list[int]] = {}
    for depth, (name, _) in enumerate(unrolled_layers(config)):
        depths.setdefault(name, []).append(depth)
    size = schedule.block_size
    num_shared = size * schedule.num_recursions
    names: dict[str, list[str]] = {}
    for place, (ours, own) in enumerate(depths.items()):
        layer, chosen = place - schedule.prelude, own
        if ours.startswith("recursions."):
            offset = {
                "stepwise": round(layer * (num_shared - 1) / max(size - 1, 1)),
                "lower": layer,
                "upper": num_shared - size + layer,
            }
            if initialization in offset:
                chosen = [schedule.prelude + offset[initialization]]
        for step, depth in enumerate(own):
            per_step = not config.effective_recursion.share_norms
            for name, suffix in layer_names(config, ours, "", step if per_step else 0).items():
                is_own = per_step and suffix.endswith("layernorm.weight")
                original = _WITHOUT_STEP.sub(".weights.0", name.removeprefix(ours))
                names[name] = [f"{theirs[d]}{original}" for d in ([depth] if is_own else chosen)]
    return names


_WITHOUT_STEP = re.compile(r"\.weights\.\d+$")


def _routers(config: DecoderConfig, seed: int) -> dict[str, Tensor]:
    """New routers, and their buffers."""
    recursion, schedule = config.effective_recursion, config.schedule
    blocks = 1 if schedule.is_cyclic else schedule.block_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        routers = [
            recursion.router.build(config.hidden_size, recursion.num_recursions)
            for _ in range(blocks)
        ]
    return {
        f"recursions.{block}.router.{name}": tensor
        for block, router in enumerate(routers)
        for name, tensor in router.state_dict().items()
    }


def _mean(parts: list[Tensor]) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return (total / len(parts)).to(parts[0].dtype)


def _random(like: Tensor, seed: int) -> Tensor:
    """As a new MoRTransformer has it: matrices from a normal distribution, norms one."""
    if like.dim() == 1:
        return torch.ones_like(like)
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(like.shape, generator=generator)).to(like.dtype)
