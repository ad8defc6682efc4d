"""Conversion of weights between a `MoRTransformer` and a GPTModel with recursions in any layout.

Megatron's name of a whole tensor is the same in every layout (the keys of `sharded_state_dict`). It is
therefore enough to convert whole tensors, and to slice them along the shards of each rank (`shards`).
The conversion is linear and invertible, so it can also be used for gradients and in the other direction.

Legend: `g` key-value heads, `q` query heads per key-value head, `d` head size, `h` hidden, `e`
experts, `f` width of an expert, `r` recursion steps.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mor_layers import DecoderConfig, MoEConfig, RecursionConfig
from mor_layers.layers import MLP_PROJECTIONS, Sublayer
from mor_layers.weights import LazyTensors, recursion_of, tensor_shapes, unrolled_layers


def megatron_tensors(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Convert the state dict of a `MoRTransformer` to whole tensors by Megatron's names.

    Raises:
        ValueError: a tensor is missing, or Megatron has no place for a setting.
    """
    return dict(megatron_view(weights, config))


def decoder_tensors(tensors: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """The inverse of `megatron_tensors`.

    Raises:
        ValueError: a tensor is missing, or Megatron has no place for a setting.
    """
    return dict(decoder_view(tensors, config))


def megatron_view(weights: Mapping[str, Tensor], config: DecoderConfig) -> LazyTensors:
    """Like `megatron_tensors`, but each tensor is computed when it is accessed."""
    names = _names(config, weights)
    return LazyTensors(
        list(names),
        lambda name: _fuse(name, [_named(weights, own) for own in names[name]], config),
    )


def decoder_view(
    tensors: Mapping[str, Tensor], config: DecoderConfig, where: str = "the weights"
) -> LazyTensors:
    """Like `decoder_tensors`, but each tensor is computed when it is accessed.

    The last fused tensor is cached, because its parts are usually read one after another.

    Args:
        where: the origin of the tensors, for error messages.
    """
    places: dict[str, list[tuple[str, int]]] = {}
    for theirs, names in megatron_names(config, tensors).items():
        for index, ours in enumerate(names):
            places.setdefault(ours, []).append((theirs, index))
    shapes = tensor_shapes(config)
    last: dict[str, Tensor] = {}

    def part_of(theirs: str, index: int) -> Tensor:
        if theirs not in last:
            last.clear()
            last[theirs] = _named(tensors, theirs)
        try:
            return _split(theirs, last[theirs], config)[index]
        except (RuntimeError, IndexError):  # the shape does not allow splitting
            return last[theirs]

    def read(name: str) -> Tensor:
        parts = [part_of(theirs, index) for theirs, index in places[name]]
        part = parts[0] if len(parts) == 1 else torch.cat(parts)
        theirs, shape = places[name][-1][0], shapes[name]
        whole, fits = last[theirs], part.shape == shape
        if not (fits or (name in _VOCABULARY and part.shape[1:] == shape[1:])):
            raise ValueError(
                f"{where}: {theirs!r} has shape {tuple(whole.shape)}, which does not give {name!r} "
                f"of shape {tuple(shape)}."
            )
        return part

    return LazyTensors(list(places), read)


_VOCABULARY = ("embedding.weight", "output.weight")  # Megatron pads them


def megatron_names(config: DecoderConfig, tensors: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each of Megatron's tensors, the names of our tensors that it consists of.

    Args:
        tensors: Megatron's names. The tensors of the router are found among them.
    """
    tensors = set(tensors)

    def as_given(name: str) -> str:
        # Megatron's own local layers name the norm before experts as if it were fused.
        local = name.replace(f".{_EXPERTS_NORM}", f".{_DENSE_NORM}")
        return local if name not in tensors and local in tensors else name

    routers = [
        f"recursions.{block}.router.{name.removeprefix(place)}"
        for block, depth in block_depths(config).items()
        for name in sorted(tensors)
        if name.startswith(place := f"decoder.layers.{depth}.recursion.router.")
    ]
    return {as_given(name): ours for name, ours in _names(config, routers).items()}


def block_depths(config: DecoderConfig) -> dict[int, int]:
    """For each recursion block, by its number, the unrolled layer at which Megatron has it."""
    depths: dict[int, int] = {}
    for depth, (name, _) in enumerate(unrolled_layers(config)):
        if config.recursion is not None and name.startswith("recursions."):
            depths.setdefault(int(name.split(".")[1]), depth)
    return depths


def _named(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(
            f"the weights have no {name!r}. Check that the settings are those of this model."
        )
    return tensors[name]


def _names(config: DecoderConfig, routers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each of Megatron's tensors, the names of our tensors that it consists of.

    Args:
        routers: our names of the router's tensors.
    """
    _refuse_what_megatron_lacks(config)
    outside = None if config.dense_ends else config.moe
    blocks = block_depths(config)
    names: dict[str, tuple[str, ...]] = {
        "embedding.word_embeddings.weight": ("embedding.weight",),
        "decoder.final_layernorm.weight": ("norm.weights.0",),
    }
    if not config.tie_embeddings:
        names["output_layer.weight"] = ("output.weight",)
    for depth, (ours, step) in enumerate(unrolled_layers(config)):
        place = f"decoder.layers.{depth}"
        if not ours.startswith("recursions."):
            names |= _layer_names(config, place, ours, outside)
        elif config.recursion is None:
            names |= _layer_names(config, place, ours, config.moe)
        elif step == 0:
            recursion = recursion_of(config, ours)
            num_norms = 1 if recursion.share_norms else recursion.num_recursions
            block, layer = int(ours.split(".")[1]), ours.rpartition(".")[2]
            place = f"decoder.layers.{blocks[block]}.recursion.layers.{layer}"
            names |= _layer_names(config, place, ours, config.moe, recursion, num_norms)
    further = config.multi_token_prediction
    for head in range(0 if further is None else further.num_heads):
        theirs, ours = f"mtp.layers.{head}", f"prediction_heads.{head}"
        names |= {f"{theirs}.{t}": (f"{ours}.{o}",) for t, o in _HEAD.items()}
        place, moe = f"{theirs}.transformer_layer", config.head_config.moe
        names |= _layer_names(config, place, f"{ours}.layers.layers.0", moe)
    for block, depth in blocks.items():
        theirs, ours = f"decoder.layers.{depth}.recursion", f"recursions.{block}"
        own = [name for name in routers if name.startswith(f"{ours}.router.")]
        own += [f"{ours}.{name}" for name in _beside_layers(recursion_of(config, ours))]
        names |= {f"{theirs}.{name.removeprefix(f'{ours}.')}": (name,) for name in own}
    return names


def _beside_layers(recursion: RecursionConfig) -> list[str]:
    """The tensors of a block that are neither its layers' nor its router's."""
    steps = recursion.num_recursions
    vectors = [f"embeddings.{step}" for step in range(steps * recursion.step_embeddings)]
    vectors += [f"gains.{step}" for step in range((steps - 1) * recursion.input_injection)]
    vectors += ["norms.0"] * recursion.loop_norm
    names = [f"step_input.{name}" for name in vectors]
    if recursion.hyper_connections is not None:
        is_static = recursion.hyper_connections.mixing == "static"
        mixing = ("bias",) if is_static else ("bias", "weight", "scale")
        names += [f"streams.mixers.{step}.{name}" for step in range(steps) for name in mixing]
    if recursion.history is not None:
        names += [f"history.mixing.{place}" for place in range(recursion.history.window)]
        names += ["history.gate.0"] * recursion.history.step_gate
    return names


def _refuse_what_megatron_lacks(config: DecoderConfig) -> None:
    """Raise ValueError for settings of a decoder that no layer of ours in Megatron has."""
    beyond = [name for name in config.beyond_llama if name != "multi_token_prediction"]
    given = {name: getattr(config, name) for name in beyond}
    for recursion in config.recursions:
        given |= {
            n: getattr(recursion, n) for n in ("adapter", "exit_norm") if getattr(recursion, n)
        }
    for name, value in given.items():
        raise ValueError(
            f"{name}={value} is not converted to Megatron. Keep the model in our format."
        )


def _layer_names(
    config: DecoderConfig,
    theirs: str,
    ours: str,
    moe: MoEConfig | None,
    recursion: RecursionConfig | None = None,
    num_norms: int = 1,
) -> dict[str, tuple[str, ...]]:
    result: dict[str, tuple[str, ...]] = {}
    for step, place in _places(f"{theirs}.self_attention", "attention", recursion):
        weight, bias = ("weight", "bias") if step is None else (f"weights.{step}", f"biases.{step}")
        result[f"{place}.linear_proj.weight"] = (f"{ours}.attention.output.{weight}",)
        if config.latent_attention is not None:
            names = _QUERY_ROWS if config.latent_attention.q_lora_rank else _QUERIES
            for their_name, own in (names | _LATENT_ROWS).items():
                result[f"{place}.{their_name}"] = (f"{ours}.attention.{own}",)
            continue
        qkv = [f"{ours}.attention.{name}" for name in ("query", "key", "value")]
        result[f"{place}.{_QKV}"] = tuple(f"{name}.{weight}" for name in qkv)
        if config.qkv_bias:
            result[f"{place}.{_QKV_BIAS}"] = tuple(f"{name}.{bias}" for name in qkv)
        if config.qk_norm:
            for name in ("query", "key"):
                their_norm = f"{place}.{name[0]}_layernorm.weight"
                result[their_norm] = (f"{ours}.attention.{name}_norm.weights.{step or 0}",)
    for step, place in _places(f"{theirs}.mlp", "mlp", recursion) if moe is None else ():
        weight = "weight" if step is None else f"weights.{step}"
        result[f"{place}.{_GATED}"] = (f"{ours}.mlp.gate.{weight}", f"{ours}.mlp.up.{weight}")
        result[f"{place}.linear_fc2.weight"] = (f"{ours}.mlp.down.{weight}",)
    if moe is not None:
        experts = _expert_names(moe, recursion)
        result |= {
            f"{theirs}.mlp.{t}": tuple(f"{ours}.mlp.{o}" for o in parts)
            for t, parts in experts.items()
        }
    mlp_norm = _DENSE_NORM if moe is None else _EXPERTS_NORM
    is_latent = config.latent_attention is not None
    attention_norm = "input_layernorm." if is_latent else "self_attention.linear_qkv.layer_norm_"
    for norm, place in (("attention", attention_norm), ("mlp", mlp_norm)):
        for step in range(num_norms):
            own = f"{step}." if num_norms > 1 else ""
            result[f"{theirs}.{place}{own}weight"] = (f"{ours}.{norm}_norm.weights.{step}",)
    if recursion is not None and recursion.norm_modulation is not None:
        for norm, place in (("attention", "input_layernorm"), ("mlp", "pre_mlp_layernorm")):
            for part in ("encoder", "mixer", "down", "up"):
                own = f"{ours}.{norm}_norm.modulation.{part}"
                result[f"{theirs}.{place}_modulation.{part}"] = (own,)
    if recursion is not None and recursion.sandwich_norms:
        for norm in ("attention_output_norm", "mlp_output_norm"):
            for step in range(num_norms):
                own = f"{step}." if num_norms > 1 else ""
                result[f"{theirs}.{norm}.{own}weight"] = (f"{ours}.{norm}.weights.{step}",)
    return result | _delta_names(theirs, ours, recursion)


def _places(
    module: str, sublayer: Sublayer, recursion: RecursionConfig | None
) -> list[tuple[int | None, str]]:
    """Where Megatron has a sublayer: at one place, or at one for each step."""
    if recursion is None or sublayer not in recursion.own_per_step:
        return [(None, module)]
    return [(step, f"{module}.{step}") for step in range(recursion.num_recursions)]


def _delta_names(
    theirs: str, ours: str, recursion: RecursionConfig | None
) -> dict[str, tuple[str, ...]]:
    relaxation = None if recursion is None else recursion.relaxation
    if recursion is None or relaxation is None:
        return {}
    parts = ("a", "b", "magnitude") if relaxation.kind == "dora" else ("a", "b")
    names = {}
    for name in relaxation.projections:
        their_module, module = ("mlp",) * 2 if name in MLP_PROJECTIONS else _ATTENTION
        for step in range(recursion.num_recursions):
            for part in parts:
                own = f"{ours}.{module}.{name}.deltas.{step}.{part}"
                names[f"{theirs}.{their_module}.deltas.{name}.{step}.{part}"] = (own,)
    return names


_ATTENTION = ("self_attention", "attention")


def _expert_names(moe: MoEConfig, recursion: RecursionConfig | None) -> dict[str, tuple[str, ...]]:
    _refuse_other_experts(moe, recursion)
    steps = 1 if recursion is None else recursion.num_recursions
    has_own = recursion is not None and recursion.expert_routers == "per_step"
    names: dict[str, tuple[str, ...]] = {
        f"experts.{_EXPERTS}": ("experts.gate", "experts.up"),
        "experts.experts.linear_fc2.weight": ("experts.down",),
        _EXPERT_ROUTER: tuple(f"router.weights.{r}" for r in range(steps if has_own else 1)),
    }
    if recursion is not None and recursion.mean_experts is not None:
        names["router.widths.values"] = ("router.widths.values",)
    if moe.bias_update_rate:  # one of ours for all steps, one of theirs for each
        of_steps = [f"biases.{step}." for step in range(steps)] if recursion is not None else [""]
        names |= {f"router.{place}{_EXPERT_BIAS}": ("router.bias",) for place in of_steps}
    if moe.shared_ffn_hidden_size:
        names[f"{_SHARED}{_GATED}"] = ("shared.gate", "shared.up")
        names[f"{_SHARED}linear_fc2.weight"] = ("shared.down",)
    return names


def _refuse_other_experts(moe: MoEConfig, recursion: RecursionConfig | None) -> None:
    """Raise ValueError for experts that Megatron's router chooses or weighs in another way."""
    sigmoid = moe.scores == "sigmoid"
    summed = moe.experts_per_token // moe.groups_per_token
    rules = (
        (
            moe.bias_update_rate and not sigmoid,
            f"MoEConfig.bias_update_rate={moe.bias_update_rate} adds a bias to softmax scores, but "
            "Megatron supports expert biases only with sigmoid scores. Use a balance loss instead.",
        ),
        (
            sigmoid and not moe.normalizes_gates and moe.experts_per_token > 1,
            "MoEConfig.normalizes_gates=False with sigmoid scores is not converted to Megatron, which "
            "divides such gates by their sum. Keep the model in our format.",
        ),
        (
            moe.num_groups > 1 and summed != (2 if sigmoid else 1),
            f"MoEConfig.num_groups={moe.num_groups} with experts_per_token={moe.experts_per_token} and "
            f"groups_per_token={moe.groups_per_token} is not converted to Megatron, which chooses "
            f"groups by the sum of their best {summed} scores ({moe.experts_per_token} // "
            f"{moe.groups_per_token}), and this model by {2 if sigmoid else 1}. Keep the model in our "
            "format.",
        ),
        (
            moe.beyond_plain and recursion is not None and recursion.mean_experts is not None,
            f"{moe.shown_beyond_plain()} with a mean number of experts is not converted to Megatron, "
            "whose thresholds are of plain softmax scores. Keep the model in our format.",
        ),
    )
    for is_wrong, reason in rules:
        if is_wrong:
            raise ValueError(reason)


_HEAD = {
    "enorm.weight": "embedding_norm.weights.0",
    "hnorm.weight": "state_norm.weights.0",
    "eh_proj.weight": "projection.weight",
    "final_layernorm.weight": "norm.weights.0",
}
_QUERIES = {"linear_q_proj.weight": "query_up.weight"}
_QUERY_ROWS = {
    "linear_q_down_proj.weight": "query_down.weight",
    "linear_q_up_proj.layer_norm_weight": "query_norm.weight",
    "linear_q_up_proj.weight": "query_up.weight",
}
_LATENT_ROWS = {
    "linear_kv_down_proj.weight": "kv_down.weight",
    "linear_kv_up_proj.layer_norm_weight": "kv_norm.weight",
    "linear_kv_up_proj.weight": "kv_up.weight",
}
_QKV, _QKV_BIAS, _GATED = "linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight"
_DENSE_NORM, _EXPERTS_NORM = "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
_EXPERTS, _EXPERT_ROUTER = "experts.linear_fc1.weight", "router.weight"
_EXPERT_BIAS, _SHARED = "expert_bias", "shared_experts."


def _fuse(name: str, parts: list[Tensor], config: DecoderConfig) -> Tensor:
    if name.endswith((_QKV, _QKV_BIAS)):  # [g q d h], [g 1 d h] twice -> [g (q+2) d, h]
        heads = (config.kv_heads, -1, config.head_size)
        return torch.cat([part.unflatten(0, heads) for part in parts], dim=1).flatten(0, 2)
    if _SHARED in name:  # [1 f h], [1 f h] -> [2f h]
        return torch.cat(parts, dim=1)[0]
    if name.endswith(_EXPERT_BIAS):  # [r e] -> [e]
        return parts[0][_step_of(name)]
    if name.endswith(_EXPERTS):  # [e f h], [e f h] -> [e 2f h]
        return torch.cat(parts, dim=1)
    if name.endswith(f"mlp.{_EXPERT_ROUTER}") and len(parts) > 1:  # r of [e h] -> [r e h]
        return torch.stack(parts)
    return torch.cat(parts) if name.endswith(_GATED) else parts[0]


def _split(name: str, tensor: Tensor, config: DecoderConfig) -> list[Tensor]:
    if name.endswith((_QKV, _QKV_BIAS)):
        heads = tensor.unflatten(0, (config.kv_heads, -1, config.head_size))
        queries = heads.shape[1] - 2
        return [part.flatten(0, 2) for part in heads.split([queries, 1, 1], dim=1)]
    if _SHARED in name:
        parts = tensor.chunk(2) if name.endswith(_GATED) else [tensor]
        return [part[None] for part in parts]
    if name.endswith(_EXPERT_BIAS):
        return [tensor[None]]
    if name.endswith(_EXPERTS):
        return list(tensor.chunk(2, dim=1))
    if name.endswith(f"mlp.{_EXPERT_ROUTER}"):
        return list(tensor.unbind()) if tensor.dim() == 3 else [tensor]
    return list(tensor.chunk(2)) if name.endswith(_GATED) else [tensor]


def _step_of(name: str) -> int:
    """The step that a tensor in a list of `biases` belongs to; 0 outside of a recursion."""
    _, found, rest = name.rpartition("biases.")
    return int(rest.split(".")[0]) if found else 0
