"""Weights of a recursive model, initialised from those of a dense one.

Sources: Bae et al. 2024 (Relaxed Recursive Transformers, arXiv 2410.20672), section 2.2, and Bae
et al. 2025 (arXiv 2507.10524). With 6 shared layers in 3 recursions, a block of two layers gets:

    stepwise  1 6          evenly spaced layers, including the first and the last
    average   for each layer, the mean of the layers that it replaces under the sharing scheme
    lower     1 2
    upper     5 6
    random    new random weights

The layers outside the block, the embeddings and the last norm are those of the dense model. With
`stepwise`, a block of one layer gets the first layer.

If the recursion is relaxed (`mor_layers.layers.relaxation`), each step's delta is the truncated
singular value decomposition of the difference between the layer at its depth and the shared weight:
`B = U S / scale`, `A = Vᵀ`. At full rank and with norms per step, the recursive model then equals
the dense one (except for biases and norms of queries and keys, which the steps share).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mor_layers.layers import MLP_PROJECTIONS, Modulator, Relaxation, row_norms
from mor_layers.models import DecoderConfig, MoRTransformer, RecursionConfig
from mor_layers.settings import require_choice
from mor_layers.weights.names import layer_names, unrolled_layers
from mor_layers.weights.tensor_files import LazyTensors

Initialization = Literal["stepwise", "average", "lower", "upper", "random"]
INITIALIZATIONS: tuple[str, ...] = get_args(Initialization)


def recursive_weights(
    weights: Mapping[str, Tensor],
    dense: DecoderConfig,
    recursion: RecursionConfig,
    initialization: Initialization,
    seed: int = 0,
) -> tuple[DecoderConfig, LazyTensors]:
    """The settings and weights of a recursive model that is initialised from a dense one.

    What steps do not share (norms under `share_norms=False`, sublayers in `own_per_step`, deltas) comes
    from the layer at the step's depth, under every initialization but `random`. The router is new,
    initialised from `seed`.

    Args:
        weights: tensors of the dense model, under the names of a MoRTransformer's state dict.
        dense: the settings of the dense model.

    Raises:
        ValueError: the model is not dense, its layers cannot be divided into such recursions, or
            the initialization is unknown.
    """
    require_choice("recursive_weights", "initialization", initialization, INITIALIZATIONS)
    if dense.recursion is not None or dense.moe is not None:
        raise ValueError(
            "a recursive model must start from a dense one, but this one has a recursion or "
            "experts. Use a model with recursion=None and moe=None."
        )
    if dense.sum_norms:
        raise ValueError(
            "sum_norms=True is not among what is carried over to a recursive model. Use looped_weights, "
            "which keeps all layers, or train from scratch."
        )
    if recursion.adapter is not None or recursion.exit_norm:
        raise ValueError(
            f"adapter={recursion.adapter} and exit_norm={recursion.exit_norm} change the states that "
            "the dense model's layers see, so nothing of what it learnt would be left. Leave them out, "
            "or train from scratch."
        )
    if recursion.sandwich_norms:
        raise ValueError(
            "sandwich_norms=True normalises outputs that the dense model does not normalise, so "
            "nothing of what it learnt would be left. Leave it out, or train from scratch."
        )
    if recursion.loop_norm:
        raise ValueError(
            "loop_norm=True norms the states between steps, which the dense model does not. Leave it "
            "out, or train from scratch."
        )
    if recursion.residual_scale is not None:
        raise ValueError(
            f"residual_scale={recursion.residual_scale} makes the output of every branch smaller "
            "than in the dense model. Leave it out, or train from scratch."
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

    originals = _originals(dense, config)

    @lru_cache(maxsize=1)  # a delta's tensors are read in succession
    def delta(place: str) -> dict[str, Tensor]:
        assert recursion.relaxation is not None
        shared_weight = make(f"{place.rpartition('.deltas.')[0]}.weight")
        if initialization != "random":
            return start_of_delta(shared_weight, weights[originals[place]], recursion.relaxation)
        return _fresh_delta(shared_weight, recursion.relaxation, seeds[f"{place}.a"])

    def make(name: str) -> Tensor:
        if name in routers:
            return routers[name]
        if ".step_input." in name:  # zero, as in a new model
            return weights["embedding.weight"].new_zeros(config.hidden_size)
        place, _, part = name.rpartition(".")
        if place in originals:
            return delta(place)[part]
        parts = [weights[source] for source in sources.get(name, [name])]
        if initialization == "random" and name in shared:
            return _random(parts[0], seeds[name])
        return parts[0] if len(parts) == 1 else _mean(parts)

    return config, LazyTensors(list(state), make)


def _sources(
    dense: DecoderConfig, config: DecoderConfig, initialization: Initialization
) -> dict[str, list[str]]:
    """For each tensor of the recursive model's layers, the tensors of the dense model it is made
    from.
    """
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
        of_all_steps = set(layer_names(config, ours, "", 0)) & set(layer_names(config, ours, "", 1))
        for step, depth in enumerate(own):
            for place_in_layer, name in enumerate(layer_names(config, ours, "", step)):
                names[name] = [
                    list(layer_names(dense, theirs[d], ""))[place_in_layer]
                    for d in (chosen if name in of_all_steps else [depth])
                ]
    return names


def _originals(dense: DecoderConfig, config: DecoderConfig) -> dict[str, str]:
    """For each delta, the weight in the dense model's layer at the depth of its step."""
    relaxation = config.effective_recursion.relaxation
    theirs = [name for name, _ in unrolled_layers(dense)]
    names: dict[str, str] = {}
    for depth, (ours, step) in enumerate(unrolled_layers(config)):
        if relaxation is None or not ours.startswith("recursions."):
            continue
        for name in relaxation.projections:
            part = f"{'mlp' if name in MLP_PROJECTIONS else 'attention'}.{name}"
            names[f"{ours}.{part}.deltas.{step}"] = f"{theirs[depth]}.{part}.weight"
    return names


def start_of_delta(
    shared: Float[Tensor, "o i"], original: Float[Tensor, "o i"], relaxation: Relaxation
) -> dict[str, Tensor]:
    """The tensors of the `StepDelta` that brings `shared` closest to `original`.

    No delta of the same rank leaves a smaller sum of squared differences (Eckart and Young 1936).
    The magnitudes of `dora` are the norms of the resulting rows, so that both kinds start from the
    same model.
    """
    rank = relaxation.rank_of(*shared.shape)
    u, s, v = torch.linalg.svd(original.double() - shared.double(), full_matrices=False)
    b = (u[:, :rank] * s[:rank] / relaxation.scale).to(shared.dtype)
    return _delta(shared, v[:rank].to(shared.dtype).contiguous(), b, relaxation)


def _fresh_delta(shared: Tensor, relaxation: Relaxation, seed: int) -> dict[str, Tensor]:
    rank = relaxation.rank_of(*shared.shape)
    a = _random(shared.new_empty(rank, shared.shape[1]), seed)
    return _delta(shared, a, shared.new_zeros(len(shared), rank), relaxation)


def _delta(shared: Tensor, a: Tensor, b: Tensor, relaxation: Relaxation) -> dict[str, Tensor]:
    if relaxation.kind == "lora":
        return {"a": a, "b": b}
    norms = row_norms(shared, a, b, relaxation.scale)
    return {"a": a, "b": b, "magnitude": norms.to(shared.dtype)}


def _routers(config: DecoderConfig, seed: int) -> dict[str, Tensor]:
    """New routers, residual streams, history and modulations of norms, and their buffers."""
    recursion, schedule = config.effective_recursion, config.schedule
    blocks = 1 if schedule.is_cyclic else schedule.block_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: dict[str, nn.Module | None] = {
            f"recursions.{block}.router": recursion.router_of(block).build(
                config.hidden_size, recursion.num_recursions
            )
            for block in range(blocks)
        }
        made["recursions.0.streams"] = recursion.build_streams(config.hidden_size)
        made["recursions.0.history"] = recursion.build_history(config.hidden_size)
        if recursion.norm_modulation is not None:
            layers = {ours for ours, _ in unrolled_layers(config) if ours.startswith("recursions.")}
            made |= {
                f"{layer}.{norm}.modulation": Modulator(
                    config.hidden_size, recursion.norm_modulation
                )
                for layer in sorted(layers)
                for norm in ("attention_norm", "mlp_norm")
            }
    return {
        f"{place}.{name}": tensor
        for place, module in made.items()
        if module is not None
        for name, tensor in module.state_dict().items()
    }


def _mean(parts: list[Tensor]) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return (total / len(parts)).to(parts[0].dtype)


def _random(like: Tensor, seed: int) -> Tensor:
    """Initial values as in a new MoRTransformer: normally distributed matrices, norms equal to one."""
    if like.dim() == 1:
        return torch.ones_like(like)
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(like.shape, generator=generator)).to(like.dtype)
